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
 * Traffic: a sink and a source for TCP streams, and datagrams of all sizes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "workload.h"

#define PERIOD (256u * 1024u) /* of the source's stream, in bytes */
#define HEADERS 42u           /* Ethernet, IP, UDP */
#define MIN_FRAME 60u

static volatile uint64_t sunk;

uint64_t sunk_bytes(void)
{
    return sunk;
}

void *sink_client(void *argument)
{
    int fd = (int)(intptr_t)argument;
    char *data = malloc(PERIOD);
    ssize_t n;
    while (data && (n = recv(fd, data, PERIOD, 0)) > 0)
        __atomic_add_fetch(&sunk, (uint64_t)n, __ATOMIC_RELAXED);
    free(data);
    close(fd);
    return NULL;
}

/* Word i of the stream is mix(i % (PERIOD / 8)): whoever reads it can tell a lost byte. */
void *source_client(void *argument)
{
    int fd = (int)(intptr_t)argument;
    uint64_t *data = malloc(PERIOD);
    size_t at = 0;
    for (size_t i = 0; data && i < PERIOD / 8; i++)
        data[i] = mix(i);
    for (ssize_t n; data && (n = send(fd, (char *)data + at, PERIOD - at, MSG_NOSIGNAL)) > 0;)
        at = (at + (size_t)n) % PERIOD;
    free(data);
    close(fd);
    return NULL;
}

/* What a datagram begins with: 18 bytes, so that a frame may be as short as Ethernet allows. */
struct __attribute__((packed)) stamp {
    char magic[2];
    uint64_t sequence; /* from 0 */
    uint64_t counter;  /* page.counter when it was sent */
};

static struct {
    pthread_mutex_t lock; /* for whoever starts it */
    struct sockaddr_in peer;
    int fd;
    unsigned count, min, max, interval_us;
    volatile int running, stop;
    volatile uint64_t sent, errors;
} datagrams = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void wait_interval(struct timespec *at, unsigned us)
{
    struct timespec now;
    at->tv_nsec += (long)(us % 1000000u) * 1000;
    at->tv_sec += us / 1000000u + at->tv_nsec / 1000000000L;
    at->tv_nsec %= 1000000000L;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > at->tv_sec + 1)
        *at = now; /* after a long pause go on, and do not catch up */
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, at, NULL) == EINTR)
        ;
}

static void *send_datagrams(void *unused)
{
    static char data[65536];
    unsigned span = datagrams.max - datagrams.min + 1;
    /* A prime that does not divide their number visits all sizes, neighbours far apart. */
    unsigned step = span % 97 ? 97 : 89, size = 0;
    struct timespec at;
    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &at);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (char)mix(i);
    for (uint64_t i = 0; !datagrams.stop && (!datagrams.count || i < datagrams.count); i++) {
        struct stamp stamp = {.magic = "PM", .sequence = i, .counter = page.counter};
        memcpy(data, &stamp, sizeof stamp);
        if (sendto(datagrams.fd, data, datagrams.min + size - HEADERS, MSG_NOSIGNAL,
                   (struct sockaddr *)&datagrams.peer, sizeof datagrams.peer) < 0)
            datagrams.errors++;
        else
            datagrams.sent++;
        size = (size + step) % span;
        if (datagrams.interval_us)
            wait_interval(&at, datagrams.interval_us);
    }
    close(datagrams.fd);
    datagrams.running = 0;
    return NULL;
}

/* Largest frame on the way to the peer, 0 if there is no way. */
static unsigned largest_frame(int fd, const struct sockaddr_in *peer)
{
    int mtu = 0;
    socklen_t size = sizeof mtu;
    struct sockaddr none = {.sa_family = AF_UNSPEC};
    if (connect(fd, (const struct sockaddr *)peer, sizeof *peer) || getsockopt(fd, IPPROTO_IP, IP_MTU, &mtu, &size))
        return 0;
    /* Connected it would report that nobody listens there. */
    connect(fd, &none, sizeof none);
    return (unsigned)mtu + 14;
}

static void start_datagrams(const unsigned *value, struct sockaddr_in peer, char *out, size_t size)
{
    int probe = IP_PMTUDISC_PROBE; /* no fragments: a datagram is a frame */
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    peer.sin_port = htons((uint16_t)value[4]);
    setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &probe, sizeof probe);
    unsigned largest = fd < 0 ? 0 : largest_frame(fd, &peer);
    pthread_mutex_lock(&datagrams.lock);
    if (datagrams.running) {
        snprintf(out, size, "error packets are sent already");
    } else if (value[1] < MIN_FRAME || value[2] < value[1] || value[2] > largest) {
        snprintf(out, size, "error frames are of %u to %u bytes", MIN_FRAME, largest);
    } else {
        datagrams.peer = peer;
        datagrams.fd = fd;
        datagrams.count = value[0];
        datagrams.min = value[1];
        datagrams.max = value[2];
        datagrams.interval_us = value[3];
        datagrams.sent = datagrams.errors = 0;
        datagrams.stop = 0;
        datagrams.running = 1;
        start(send_datagrams, NULL);
        fd = -1;
        snprintf(out, size, "ok");
    }
    pthread_mutex_unlock(&datagrams.lock);
    if (fd >= 0)
        close(fd);
}

void packets_command(const char *line, int connection, char *out, size_t size)
{
    unsigned value[5];
    char word[8] = "", end;
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    if (sscanf(line, "%u %u %u %u %u %c", value, value + 1, value + 2, value + 3, value + 4, &end) == 5 &&
        value[4] && value[4] < 65536 && !getpeername(connection, (struct sockaddr *)&peer, &length)) {
        start_datagrams(value, peer, out, size);
    } else if (sscanf(line, "%7s %c", word, &end) == 1 && (!strcmp(word, "stop") || !strcmp(word, "sent"))) {
        if (!strcmp(word, "stop")) {
            datagrams.stop = 1;
            for (int i = 0; i < 2000 && datagrams.running; i++)
                usleep(1000);
        }
        snprintf(out, size, "ok %" PRIu64 " sent %" PRIu64 " errors%s", datagrams.sent, datagrams.errors,
                 datagrams.running ? " running" : "");
    } else {
        snprintf(out, size, "error packets COUNT MIN MAX INTERVAL_US PORT | packets stop | packets sent");
    }
}
