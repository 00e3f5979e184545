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
 * - a counter in a page of its own that a host can find in guest memory by its
 *   magic (nova_pmt/lab/workload.py knows the layout);
 * - a dirtier that rewrites N pages every M milliseconds. What each page must
 *   hold is kept a second time in a shadow table, so "verify" finds a page that
 *   a checkpoint lost, tore or put in the wrong place;
 * - TCP echo on port 7, line commands on port 7000 ("help" lists them).
 *
 * Initial values come from the environment, that is from kernel arguments:
 * tick_ms, console_every, dirty_pages, dirty_ms, dirty_full, dirty_once, buffer_mib.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "init.h"

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define MIB (1024u * 1024u)
#define FULL (1ull << 63) /* in the shadow table: the whole page was rewritten */

/* The counter page. Offsets are part of the contract with the host's side. */
struct counter_page {
    char magic[16];
    volatile uint64_t counter; /* 16 */
    uint64_t boot;             /* 24: random, differs after each boot */
    volatile uint64_t rounds;  /* 32: dirty rounds done */
    char pad[PAGE - 40];
};
static struct counter_page page __attribute__((aligned(4096)));

static struct {
    pthread_mutex_t lock; /* guards buffer, shadow and the two below */
    uint64_t *buffer;
    uint64_t *shadow; /* per page: sequence of its last write, maybe | FULL; 0 = never */
    uint64_t sequence;
    size_t pages, position, step;
} dirt = {.lock = PTHREAD_MUTEX_INITIALIZER};

static struct {
    pthread_mutex_t lock;
    uint64_t **chunk; /* one MiB each, page j of chunk i derives from (i, j) */
    size_t chunks;
    uint64_t seed;
} filled = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Rate settings; written by the control server, read by the loops. */
static volatile unsigned tick_ms = 10, console_every = 10;
static volatile unsigned dirty_pages, dirty_ms = 20, dirty_full;
static int console = 2;

static void say(const char *format, ...)
{
    char line[256];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line, sizeof line, format, args);
    va_end(args);
    if (n > 0 && write(console, line, (size_t)n) < 0)
        return; /* a console that is gone must not stop the counter */
}

static uint64_t mix(uint64_t x) /* splitmix64: cheap, and looks random to a compressor */
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static unsigned setting(const char *name, unsigned fallback)
{
    const char *text = getenv(name);
    return text && *text ? (unsigned)strtoul(text, NULL, 10) : fallback;
}

/* Sleep until `at` + ms; a schedule that is far behind (a long pause) starts anew. */
static void sleep_to_next(struct timespec *at, unsigned ms)
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

/* What page `index` holds after its write number `sequence`: word `word` of it. */
static uint64_t content(uint64_t sequence, size_t index, unsigned word)
{
    return mix(sequence ^ mix(index * WORDS + word));
}

static void dirty(size_t count, int full)
{
    if (!dirt.pages)
        return;
    while (count > 0) {
        /* Short holds of the lock, so that verify and bursts can take turns. */
        size_t part = count > 4096 ? 4096 : count;
        count -= part;
        pthread_mutex_lock(&dirt.lock);
        while (part-- > 0) {
            size_t index = dirt.position;
            uint64_t *target = dirt.buffer + index * WORDS;
            uint64_t sequence = ++dirt.sequence;
            dirt.position = (index + dirt.step) % dirt.pages;
            if (full)
                for (unsigned w = 1; w < WORDS; w++)
                    target[w] = content(sequence, index, w);
            target[0] = content(sequence, index, 0);
            dirt.shadow[index] = full ? sequence | FULL : sequence;
        }
        pthread_mutex_unlock(&dirt.lock);
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

/* Compare all memory of ours with what it must hold; the first wrong page, or -1. */
static long verify(size_t *checked)
{
    long bad = -1;
    *checked = 0;
    for (size_t start = 0; start < dirt.pages && bad < 0; start += 1024) {
        pthread_mutex_lock(&dirt.lock);
        for (size_t i = start; i < dirt.pages && i < start + 1024 && bad < 0; i++) {
            uint64_t sequence = dirt.shadow[i] & ~FULL, *have = dirt.buffer + i * WORDS;
            if (!sequence)
                continue;
            unsigned words = dirt.shadow[i] & FULL ? WORDS : 1;
            for (unsigned w = 0; w < words; w++)
                if (have[w] != content(sequence, i, w))
                    bad = (long)i;
            ++*checked;
        }
        pthread_mutex_unlock(&dirt.lock);
    }
    pthread_mutex_lock(&filled.lock);
    for (size_t c = 0; c < filled.chunks && bad < 0; c++)
        for (size_t w = 0; w < MIB / 8 && bad < 0; w += WORDS, ++*checked)
            for (size_t i = w; i < w + WORDS; i++)
                if (filled.chunk[c][i] != mix(filled.seed ^ (c * (MIB / 8) + i)))
                    bad = (long)(dirt.pages + c * (MIB / PAGE) + w / WORDS);
    pthread_mutex_unlock(&filled.lock);
    return bad;
}

/* Take `mib` more MiB and keep them, full of data that does not compress. */
static int fill(size_t mib)
{
    int result = 0;
    pthread_mutex_lock(&filled.lock);
    if (!filled.seed)
        filled.seed = mix(page.boot) | 1;
    for (; mib > 0; mib--) {
        uint64_t *chunk = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        uint64_t **table = realloc(filled.chunk, (filled.chunks + 1) * sizeof *table);
        if (table)
            filled.chunk = table;
        if (chunk == MAP_FAILED || !table) {
            result = -1;
            break;
        }
        for (size_t i = 0; i < MIB / 8; i++)
            chunk[i] = mix(filled.seed ^ (filled.chunks * (MIB / 8) + i));
        filled.chunk[filled.chunks++] = chunk;
    }
    pthread_mutex_unlock(&filled.lock);
    return result;
}

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
static int command(const char *line, char *out, size_t size)
{
    unsigned a = 0, b = 0;
    char word[16] = "";
    int n = sscanf(line, "%15s %u %u", word, &a, &b);
    snprintf(out, size, "ok");
    if (n == 1 && !strcmp(word, "counter")) {
        snprintf(out, size, "%llu", (unsigned long long)page.counter);
    } else if (n == 1 && !strcmp(word, "boot")) {
        snprintf(out, size, "%016llx", (unsigned long long)page.boot);
    } else if (n == 1 && !strcmp(word, "rounds")) {
        snprintf(out, size, "%llu", (unsigned long long)page.rounds);
    } else if (n == 3 && !strcmp(word, "dirty") && (b || !a)) {
        dirty_ms = b ? b : 20;
        dirty_pages = a;
    } else if (n == 2 && !strcmp(word, "full")) {
        dirty_full = a;
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
        snprintf(out, size, "counter=%llu boot=%016llx rounds=%llu dirty=%u/%ums full=%u buffer=%zu fill=%zuMiB",
                 (unsigned long long)page.counter, (unsigned long long)page.boot,
                 (unsigned long long)page.rounds, dirty_pages, dirty_ms, dirty_full, dirt.pages, filled.chunks);
    } else if (n == 1 && !strcmp(word, "reboot")) {
        return 1;
    } else {
        snprintf(out, size, "error commands: counter boot rounds status verify reboot | dirty PAGES MS | "
                            "burst PAGES | full 0|1 | fill MIB | tick MS | console EVERY");
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
        int again = command(line, answer, sizeof answer - 1);
        strcat(answer, "\n");
        if (send(fd, answer, strlen(answer), MSG_NOSIGNAL) < 0)
            break;
        if (again) {
            int left = 1;
            /* The answer must be out, and acknowledged, before the network is gone. */
            for (int i = 0; i < 200 && left > 0; i++) {
                usleep(5000);
                if (ioctl(fd, 0x5411 /* SIOCOUTQ */, &left))
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

static void start(void *(*function)(void *), void *argument)
{
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 * 1024);
    if (pthread_create(&thread, &attributes, function, argument))
        say("ERROR no thread\n");
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

int main(void)
{
    static struct server echo = {.port = 7, .client = echo_client};
    static struct server control = {.port = 7000, .client = control_client};
    struct timespec real, mono;
    size_t bytes = (size_t)setting("buffer_mib", 32) * MIB;

    signal(SIGPIPE, SIG_IGN);
    start_machine();
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

    if (!bytes)
        bytes = MIB;
    dirt.pages = bytes / PAGE;
    /* A prime that does not divide their number visits all pages, neighbours far apart. */
    dirt.step = dirt.pages % 104729 ? 104729 : 7919;
    dirt.buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    dirt.shadow = calloc(dirt.pages, sizeof *dirt.shadow);
    if (dirt.buffer == MAP_FAILED || !dirt.shadow) {
        say("ERROR buffer_mib=%zu does not fit into this guest\n", bytes / MIB);
        dirt.pages = 0;
        dirty_pages = 0;
    } else {
        /* Huge pages would make one write dirty 2 MiB as seen by no one but us. */
        madvise(dirt.buffer, bytes, MADV_NOHUGEPAGE);
        memset(dirt.buffer, 1, bytes);
    }
    dirty(setting("dirty_once", 0), (int)dirty_full);

    memcpy(page.magic, "PMT-LAB-COUNTER", 16);
    serve(&echo);
    serve(&control);
    start(count_loop, NULL);
    start(dirty_loop, NULL);
    start(console_loop, NULL);
    say("READY boot=%016llx\n", (unsigned long long)page.boot);
    for (;;)
        pause();
}
