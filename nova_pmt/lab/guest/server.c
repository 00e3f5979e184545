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
 * The workload's servers: each connection has its thread, so that a slow command
 * holds up nobody else.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <unistd.h>

#include "workload.h"

static size_t free_mib(void)
{
    unsigned long kib = 0;
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "MemAvailable: %lu kB", &kib) == 1)
            break;
    if (f)
        fclose(f);
    return kib / 1024;
}

/* One command line in, one answer line out. Returns 1 to restart the machine. */
static int command(const char *line, int connection, char *out, size_t size)
{
    unsigned a = 0, b = 0;
    char word[16] = "";
    int n = sscanf(line, "%15s %u %u", word, &a, &b);
    snprintf(out, size, "ok");
    if (!strncmp(line, "disk ", 5)) {
        disk_command(line + 5, out, size);
    } else if (!strncmp(line, "packets ", 8)) {
        packets_command(line + 8, connection, out, size);
    } else if (n == 1 && !strcmp(word, "counter")) {
        snprintf(out, size, "%llu", (unsigned long long)page.counter);
    } else if (n == 1 && !strcmp(word, "boot")) {
        snprintf(out, size, "%016llx", (unsigned long long)page.boot);
    } else if (n == 1 && !strcmp(word, "rounds")) {
        snprintf(out, size, "%llu", (unsigned long long)page.rounds);
    } else if (n == 1 && !strcmp(word, "sunk")) {
        snprintf(out, size, "%llu", (unsigned long long)sunk_bytes());
    } else if (n == 3 && !strcmp(word, "dirty") && (b || !a)) {
        dirty_ms = b ? b : 20;
        dirty_pages = a;
    } else if (n == 2 && !strcmp(word, "full")) {
        dirty_full = a;
    } else if (n == 2 && !strcmp(word, "skew")) {
        dirty_skew = a;
    } else if (n == 2 && !strcmp(word, "burst")) {
        dirty(a, (int)dirty_full);
        page.rounds++;
    } else if (n == 2 && !strcmp(word, "fill")) {
        /* Leave some: the guest's kernel would rather kill us than refuse. */
        if (a + 8 > free_mib())
            snprintf(out, size, "error only %zu MiB are free and 8 of them must stay so", free_mib());
        else if (fill(a))
            snprintf(out, size, "error no memory");
    } else if (n == 2 && !strcmp(word, "tick") && a) {
        tick_ms = a;
    } else if (n == 2 && !strcmp(word, "console")) {
        console_every = a;
    } else if (n == 1 && !strcmp(word, "verify")) {
        size_t checked;
        long bad = verify(&checked);
        if (bad < 0)
            snprintf(out, size, "ok %zu pages", checked);
        else
            snprintf(out, size, "error page %ld does not hold what was last written", bad);
    } else if (n == 1 && !strcmp(word, "status")) {
        snprintf(out, size,
                 "counter=%llu boot=%016llx rounds=%llu dirty=%u/%ums full=%u buffer=%zu fill=%zuMiB "
                 "disks=%zu records=%llu",
                 (unsigned long long)page.counter, (unsigned long long)page.boot,
                 (unsigned long long)page.rounds, dirty_pages, dirty_ms, dirty_full, buffer_pages(), filled_mib(),
                 disk_count, (unsigned long long)record_count());
    } else if (n == 1 && !strcmp(word, "reboot")) {
        return 1;
    } else {
        snprintf(out, size, "error commands: counter boot rounds sunk status verify reboot | "
                            "dirty PAGES MS | burst PAGES | full 0|1 | skew 0|1 | fill MIB | tick MS | console EVERY | disk ... | packets ...");
    }
    return 0;
}

static void restart_machine(void)
{
    /* A reset leaves memory as it is: no stale counter page may be found in it. */
    memset((void *)&page, 0, sizeof page.magic);
    reboot(RB_AUTOBOOT);
}

static void *control_client(void *argument)
{
    int fd = (int)(intptr_t)argument;
    char line[256], answer[256];
    FILE *f = fdopen(fd, "r");
    while (f && fgets(line, sizeof line, f)) {
        int again = command(line, fd, answer, sizeof answer - 1);
        strcat(answer, "\n");
        if (send(fd, answer, strlen(answer), MSG_NOSIGNAL) < 0)
            break;
        if (again) {
            int left = 1;
            /* The answer must be out, and acknowledged, before the network is gone. */
            for (int i = 0; i < 200 && left > 0; i++) {
                usleep(5000);
                if (ioctl(fd, SIOCOUTQ, &left))
                    break;
            }
            restart_machine();
        }
    }
    if (f)
        fclose(f);
    return NULL;
}

static void *echo_client(void *argument)
{
    int fd = (int)(intptr_t)argument;
    char data[65536];
    ssize_t n;
    while ((n = recv(fd, data, sizeof data, 0)) > 0)
        for (ssize_t sent = 0, part; sent < n; sent += part)
            if ((part = send(fd, data + sent, (size_t)(n - sent), MSG_NOSIGNAL)) < 0) {
                close(fd);
                return NULL;
            }
    close(fd);
    return NULL;
}

struct server {
    uint16_t port;
    void *(*client)(void *);
    int fd;
};

static __attribute__((noreturn)) void *accept_loop(void *argument)
{
    struct server *server = argument;
    for (;;) {
        int one = 1, fd = accept4(server->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            continue;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        start(server->client, (void *)(intptr_t)fd);
    }
}

static void serve(struct server *server)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(server->port)};
    int one = 1;
    server->fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(server->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(server->fd, (struct sockaddr *)&address, sizeof address) || listen(server->fd, 64))
        say("ERROR port %u: %s\n", server->port, strerror(errno));
    else
        start(accept_loop, server);
}

void serve_all(void)
{
    static struct server echo = {.port = 7, .client = echo_client};
    static struct server sink = {.port = 9, .client = sink_client};
    static struct server source = {.port = 19, .client = source_client};
    static struct server control = {.port = 7000, .client = control_client};
    static struct server transactions = {.port = 7001, .client = transaction_client};
    serve(&echo);
    serve(&sink);
    serve(&source);
    serve(&control);
    serve(&transactions);
}
