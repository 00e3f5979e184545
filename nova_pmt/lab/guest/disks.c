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
 *
 * The workload's disks: their names, where on them the records of transactions lie, and load for
 * the rest of them. Nothing goes through the page cache: a checkpoint's disk and memory must fit
 * together by what the disk was told, not by what the guest would write some day.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "workload.h"

#define KIB 1024u
#define MAX_BLOCK_KIB 4096u

struct disk disks[MAX_DISKS];
size_t disk_count;

/* The kernel names SCSI disks as it finds them, at once and in any order; we name them by their
 * number on the controller, as the host does. The kernel's name of ours, or NULL. */
static const char *kernel_name(const char *name, char *found, size_t size)
{
    snprintf(found, size, "%s", name);
    if (strncmp(name, "sd", 2))
        return found;
    unsigned wanted = (unsigned)(name[2] - 'a'), lun;
    wanted += wanted >= 7; /* which on a SCSI bus is the controller itself */
    DIR *all = opendir("/sys/class/scsi_device");
    *found = 0;
    for (struct dirent *entry; all && !*found && (entry = readdir(all));) {
        char path[300];
        if (sscanf(entry->d_name, "%*u:%*u:%*u:%u", &lun) != 1 || lun != wanted)
            continue;
        snprintf(path, sizeof path, "/sys/class/scsi_device/%s/device/block", entry->d_name);
        DIR *blocks = opendir(path);
        for (struct dirent *block; blocks && (block = readdir(blocks));)
            if (block->d_name[0] != '.')
                snprintf(found, size, "%.*s", (int)size - 1, block->d_name);
        if (blocks)
            closedir(blocks);
    }
    if (all)
        closedir(all);
    return *found ? found : NULL;
}

static int is_readonly(const char *kernel)
{
    char path[64];
    int value = 0;
    snprintf(path, sizeof path, "/sys/block/%s/ro", kernel);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%d", &value) != 1)
        value = 0;
    if (f)
        fclose(f);
    return value;
}

/* Open one by our name. Returns 0, or -1 with errno. */
static int open_disk(struct disk *disk, const char *name, int flags)
{
    char found[32], path[64];
    const char *kernel = kernel_name(name, found, sizeof found);
    if (!kernel || strchr(kernel, '/')) {
        errno = ENOENT;
        return -1;
    }
    snprintf(disk->name, sizeof disk->name, "%s", name);
    snprintf(path, sizeof path, "/dev/%s", kernel);
    disk->writable = !is_readonly(kernel);
    disk->fd = open(path, (disk->writable ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC | flags);
    if (disk->fd >= 0 && ioctl(disk->fd, BLKGETSIZE64, &disk->size)) {
        close(disk->fd);
        disk->fd = -1;
    }
    return disk->fd >= 0 ? 0 : -1;
}

void find_disks(void)
{
    static const char *const prefixes[] = {"vd", "sd"};
    for (size_t p = 0; p < 2; p++)
        for (char letter = 'a'; letter <= 'z' && disk_count < MAX_DISKS; letter++) {
            char name[8];
            snprintf(name, sizeof name, "%s%c", prefixes[p], letter);
            if (open_disk(&disks[disk_count], name, 0) == 0)
                disk_count++;
            else if (errno != ENOENT)
                say("ERROR disk %s: %s\n", name, strerror(errno));
            else
                break;
        }
}

void *io_buffer(size_t bytes)
{
    void *buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return buffer == MAP_FAILED ? NULL : buffer;
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

/* What a compressor makes something of: lines of a log, each with numbers of its own. */
static void fill_with_lines(char *data, size_t size)
{
    size_t at = 0;
    for (uint64_t i = 0; at < size; i++) {
        char line[128];
        uint64_t x = mix(i);
        int n = snprintf(line, sizeof line, "%10" PRIu64 ".%03u web%02u app[%u]: GET /item/%u 200 %u bytes %u us\n",
                         1700000000 + i / 7, (unsigned)(x % 1000), (unsigned)(x >> 10) % 40,
                         (unsigned)(x >> 16) % 9000 + 1000, (unsigned)(x >> 30) % 50000, (unsigned)(x >> 46) % 20000,
                         (unsigned)(x >> 52) % 4000);
        size_t part = (size_t)n < size - at ? (size_t)n : size - at;
        memcpy(data + at, line, part);
        at += part;
    }
}

/* `count` blocks into the area for load; no two blocks ever written are alike. */
static int write_blocks(struct disk *disk, size_t block, unsigned count, int at_random, int lines)
{
    static volatile uint64_t written;
    uint64_t places = (disk->size - LOAD_AT) / block;
    uint64_t *data = io_buffer(block);
    int failed = !data;
    if (data && lines)
        fill_with_lines((char *)data, block);
    for (size_t i = 0; data && !lines && i < block / 8; i++)
        data[i] = mix(i);
    for (unsigned i = 0; i < count && !failed; i++) {
        uint64_t stamp = __atomic_add_fetch(&written, 1, __ATOMIC_RELAXED);
        uint64_t place = at_random ? mix(stamp) % places : i % places;
        /* All of a block is new: a compressor must not find in one what was in the one before it. */
        uint64_t change = mix(stamp) | 1;
        for (size_t at = 0; !lines && at < block / 8; at++)
            data[at] += change;
        for (size_t at = 0; at < block / 8; at += PAGE / 8)
            data[at] = mix(page.boot) ^ stamp;
        failed = pwrite(disk->fd, data, block, (off_t)(LOAD_AT + place * block)) != (ssize_t)block;
    }
    int saved = errno;
    if (data)
        munmap(data, block);
    errno = saved;
    return failed;
}

void disk_command(const char *line, char *out, size_t size)
{
    char what[8] = "", order[8] = "", name[8] = "", end;
    unsigned a = 0, b = 0;
    int flags = 0, failed = 0;
    if (sscanf(line, "write %4s %u %u %7s %c", order, &a, &b, name, &end) == 4) {
        strcpy(what, "write");
        if ((strcmp(order, "seq") && strcmp(order, "rand") && strcmp(order, "text")) || !a || a % 4 || a > MAX_BLOCK_KIB)
            goto usage;
    } else if (sscanf(line, "fua %u %7s %c", &b, name, &end) == 2) {
        strcpy(what, "fua");
        flags = O_DSYNC;
        a = 4;
    } else if (sscanf(line, "%7s %u %u %7s %c", what, &a, &b, name, &end) != 4 || !b ||
               (strcmp(what, "discard") && strcmp(what, "zero"))) {
        goto usage;
    }

    struct disk disk;
    if (open_disk(&disk, name, flags)) {
        snprintf(out, size, "error disk %s: %s", name, strerror(errno));
        return;
    }
    uint64_t room = disk.size > LOAD_AT ? (disk.size - LOAD_AT) / KIB : 0;
    if (!disk.writable) {
        snprintf(out, size, "error disk %s is read-only", name);
    } else if ((*what == 'w' || *what == 'f' ? a : (uint64_t)a + b) > room) {
        snprintf(out, size, "error disk %s: %" PRIu64 " KiB are free for load (beyond %u MiB)", name, room,
                 (unsigned)(LOAD_AT >> 20));
    } else {
        uint64_t start = now_us(), kib = b;
        if (*what == 'w' || *what == 'f') {
            failed = write_blocks(&disk, a * KIB, b, *what == 'f' || *order == 'r', *order == 't');
            failed = failed || (*what == 'w' && fdatasync(disk.fd));
            kib = (uint64_t)a * b;
        } else {
            uint64_t range[2] = {LOAD_AT + (uint64_t)a * KIB, (uint64_t)b * KIB};
            failed = ioctl(disk.fd, *what == 'd' ? BLKDISCARD : BLKZEROOUT, range);
        }
        if (failed)
            snprintf(out, size, "error disk %s: %s", name, strerror(errno));
        else
            snprintf(out, size, "ok %" PRIu64 " %" PRIu64, kib, now_us() - start);
    }
    close(disk.fd);
    return;
usage:
    snprintf(out, size, "error disk write seq|rand|text BLOCK_KIB COUNT DEV | disk discard OFFSET_KIB LENGTH_KIB DEV | "
                        "disk zero OFFSET_KIB LENGTH_KIB DEV | disk fua COUNT DEV");
}
