/*
 * Licensed under the Apache License, Version 2.0 (the "License"); you may
 * not use this file except in compliance with the License. You may obtain
 * a copy of the License at
 *
 *      http://www.apache.org/licenses/LICENSE-2.0
 *
 * Unless required by applicable law or agreed to in writing, software
 * distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 * WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 * License for the specific language governing permissions and limitations
 * under the License.
 *
 * What the workload needs before it can start: /dev, /proc, /sys, the virtio
 * modules, the network. A shell with busybox would do the same in 15 processes,
 * which cost more than a second under TCG.
 */
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "workload.h"

static void load_modules(const char *list)
{
    char name[64], path[96];
    FILE *order = fopen(list, "r");
    while (order && fscanf(order, "%63s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s.ko", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST))
            fprintf(stderr, "ERROR module %s: %s\n", name, strerror(errno));
        if (fd >= 0)
            close(fd);
    }
    if (order)
        fclose(order);
}

static void set_address(struct ifreq *request, uint32_t address)
{
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = address};
    memcpy(&request->ifr_addr, &in, sizeof in);
}

/* Give the interface its address ("10.77.2.100/24", may be NULL) and start it. */
static int start_interface(const char *name, const char *address)
{
    struct ifreq request = {0};
    int result = -1, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (address) {
        char ip[32];
        const char *slash = strchr(address, '/');
        unsigned bits = slash ? (unsigned)atoi(slash + 1) : 24;
        snprintf(ip, sizeof ip, "%.*s", slash ? (int)(slash - address) : (int)strlen(address), address);
        set_address(&request, inet_addr(ip));
        if (ioctl(fd, SIOCSIFADDR, &request))
            goto out;
        set_address(&request, htonl(bits ? ~0u << (32 - bits) : 0));
        if (ioctl(fd, SIOCSIFNETMASK, &request))
            goto out;
    }
    if (ioctl(fd, SIOCGIFFLAGS, &request))
        goto out;
    request.ifr_flags |= IFF_UP | IFF_RUNNING;
    result = ioctl(fd, SIOCSIFFLAGS, &request);
out:
    close(fd);
    return result;
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        fprintf(stderr, "ERROR %s: %s\n", path, strerror(errno));
    if (fd >= 0)
        close(fd);
}

static int count_block_devices(const char *prefix)
{
    int count = 0;
    DIR *directory = opendir("/sys/block");
    for (struct dirent *entry; directory && (entry = readdir(directory));)
        count += !strncmp(entry->d_name, prefix, strlen(prefix));
    if (directory)
        closedir(directory);
    return count;
}

/* The kernel looks for SCSI disks beside all else; wait until it has found them. */
static void start_scsi(int disks)
{
    load_modules("/modules/order.scsi");
    for (int i = 0; i < 2000 && count_block_devices("sd") < disks; i++)
        usleep(5000);
    if (count_block_devices("sd") < disks)
        fprintf(stderr, "ERROR %d of %d SCSI disks\n", count_block_devices("sd"), disks);
}

void start_machine(void)
{
    const char *address = getenv("guest_ip");
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    load_modules("/modules/order");
    start_interface("lo", NULL);
    /* Compaction would move the counter's page, which hosts watch where they have found it. */
    write_file("/proc/sys/vm/compact_unevictable_allowed", "0");
    /* Say so when the address is up: the neighbours may know it from an earlier guest. */
    write_file("/proc/sys/net/ipv4/conf/default/arp_notify", "1");
    write_file("/proc/sys/net/ipv4/conf/all/arp_notify", "1");
    /* Room for the data of 30 ms, for which a protected guest waits for each acknowledgement: a
     * window is half of the buffer. The last are pages, which the kernel derives from its memory. */
    write_file("/proc/sys/net/ipv4/tcp_rmem", "4096 131072 16777216");
    write_file("/proc/sys/net/ipv4/tcp_wmem", "4096 65536 16777216");
    write_file("/proc/sys/net/ipv4/tcp_mem", "8192 10240 12288");
    if (address && !strcmp(address, "dhcp")) {
        char lease[32];
        start_interface("eth0", NULL);
        if (ask_for_address("eth0", lease, sizeof lease))
            fprintf(stderr, "ERROR eth0: DHCP: %s\n", strerror(errno));
        else if (start_interface("eth0", lease))
            fprintf(stderr, "ERROR eth0: %s\n", strerror(errno));
        else
            say("ADDRESS %s", lease);
    } else if (address && start_interface("eth0", address))
        fprintf(stderr, "ERROR eth0: %s\n", strerror(errno));
    for (int number = 1; number < 10; number++) {
        char name[IFNAMSIZ];
        snprintf(name, sizeof name, "eth%d", number);
        if (!if_nametoindex(name))
            break;
        if (start_interface(name, NULL))
            fprintf(stderr, "ERROR %s: %s\n", name, strerror(errno));
    }
    if (getenv("scsi_disks"))
        start_scsi(atoi(getenv("scsi_disks")));
}
