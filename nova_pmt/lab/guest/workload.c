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
 * The workload of the lab's guest, and its only process: as PID 1 its death is a
 * kernel panic, so that a crash in the guest cannot go unseen.
 *
 * - a counter in a page of its own, which a host finds in guest memory by its magic;
 * - a dirtier that rewrites N pages every M milliseconds (memory.c);
 * - TCP echo on port 7, line commands on port 7000 (server.c);
 * - a transactional server on port 7001 (transactions.c), on all disks there are (disks.c);
 * - streams and datagrams: a sink on port 9, a source on port 19 (traffic.c).
 *
 * Initial values come from the environment, that is from kernel arguments:
 * tick_ms, console_every, dirty_pages, dirty_ms, dirty_full, dirty_once, buffer_mib.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "workload.h"

#define MIB (1024u * 1024u)

struct counter_page page __attribute__((aligned(4096)));
volatile unsigned tick_ms = 10, console_every = 10;
volatile unsigned dirty_pages, dirty_ms = 20, dirty_full, dirty_skew;
static int console = 2;

void say(const char *format, ...)
{
    char line[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > 0 && write(console, line, (size_t)n) < 0)
        return; /* a console that is gone must not stop the counter */
}

static unsigned setting(const char *name, unsigned fallback)
{
    const char *text = getenv(name);
    return text && *text ? (unsigned)strtoul(text, NULL, 10) : fallback;
}

/* Sleep until `at` + ms; a schedule that is far behind (a long pause) starts anew. */
void sleep_to_next(struct timespec *at, unsigned ms)
{
    struct timespec now;
    at->tv_nsec += (long)ms * 1000000L;
    at->tv_sec += at->tv_nsec / 1000000000L;
    at->tv_nsec %= 1000000000L;
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (now.tv_sec > at->tv_sec + 1)
        *at = now;
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, at, NULL) == EINTR)
        ;
}

static __attribute__((noreturn)) void *count_loop(void *unused)
{
    struct timespec at;
    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &at);
    for (;;) {
        sleep_to_next(&at, tick_ms);
        page.counter++;
    }
}

/* Printing has its own thread: the serial port is slow and may block. */
static __attribute__((noreturn)) void *console_loop(void *unused)
{
    uint64_t next = 0;
    struct timespec at;
    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &at);
    for (;;) {
        unsigned every = console_every;
        sleep_to_next(&at, tick_ms);
        if (!every)
            continue;
        if (!next || next > page.counter + every)
            next = (page.counter / every + 1) * every;
        for (; next <= page.counter; next += every)
            say("TICK %llu\n", (unsigned long long)next);
    }
}

static __attribute__((noreturn)) void *dirty_loop(void *unused)
{
    struct timespec at;
    (void)unused;
    clock_gettime(CLOCK_MONOTONIC, &at);
    for (;;) {
        sleep_to_next(&at, dirty_ms);
        if (dirty_pages) {
            dirty(dirty_pages, (int)dirty_full);
            page.rounds++;
        }
    }
}

void start(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    if (pthread_create(&thread, &attributes, function, argument))
        say("ERROR no thread\n");
}

int main(void)
{
    struct timespec real, mono;
    size_t bytes = (size_t)setting("buffer_mib", 32) * MIB;

    signal(SIGPIPE, SIG_IGN);
    start_machine();
    if (mlock((const void *)&page, sizeof page))
        fprintf(stderr, "ERROR mlock: %s\n", strerror(errno));
    console = open("/dev/console", O_WRONLY | O_NOCTTY | O_CLOEXEC);
    /* Reading /dev/urandom this early would gather entropy first: a second under TCG. The
     * pool alone may be the same at each boot, but the clocks never are. */
    syscall(SYS_getrandom, &page.boot, sizeof page.boot, GRND_INSECURE);
    clock_gettime(CLOCK_REALTIME, &real);
    clock_gettime(CLOCK_MONOTONIC, &mono);
    page.boot ^= mix((uint64_t)real.tv_sec) ^ mix((uint64_t)real.tv_nsec) ^ mix((uint64_t)mono.tv_nsec);

    tick_ms = setting("tick_ms", 10) ? setting("tick_ms", 10) : 1;
    console_every = setting("console_every", 10);
    dirty_pages = setting("dirty_pages", 0);
    dirty_ms = setting("dirty_ms", 20) ? setting("dirty_ms", 20) : 1;
    dirty_full = setting("dirty_full", 0);

    if (make_buffer(bytes ? bytes : MIB)) {
        say("ERROR buffer_mib=%zu does not fit into this guest\n", bytes / MIB);
        dirty_pages = 0;
    }
    dirty(setting("dirty_once", 0), (int)dirty_full);

    find_disks();
    if (start_transactions())
        say("ERROR no memory for transactions\n");

    memcpy(page.magic, "PMT-LAB-COUNTER", 16);
    serve_all();
    start(count_loop, NULL);
    start(dirty_loop, NULL);
    start(console_loop, NULL);
    say("READY boot=%016llx\n", (unsigned long long)page.boot);
    for (;;)
        pause();
}
