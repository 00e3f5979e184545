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
 * A small transactional server: each request gets the next sequence number, is written durably to
 * every disk and then answered. The host's side has the same record: lab/transactions.py.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "workload.h"

#define RECORD 512u
#define WORDS (RECORD / 8)
#define RECORDS_AT (1ull << 20) /* record s lies at RECORDS_AT + (s - 1) * RECORD */
#define CHUNK (256u * 1024u)

struct entry {
    uint64_t seq, client, request;
};

static struct {
    pthread_mutex_t lock; /* held while a record is written: their order is that of the disk */
    struct entry *table;
    uint64_t *record; /* as O_DIRECT wants it */
    uint64_t count, capacity;
} log_ = {.lock = PTHREAD_MUTEX_INITIALIZER};

static void build(uint64_t *words, const struct entry *entry)
{
    uint64_t key = mix(entry->seq ^ mix(entry->client ^ mix(entry->request))), sum = 0;
    memcpy(words, "PMT-LAB-RECORD\0", 16);
    words[2] = entry->seq;
    words[3] = entry->client;
    words[4] = entry->request;
    words[5] = page.boot;
    words[6] = 0;
    for (unsigned i = 7; i < WORDS; i++)
        words[i] = mix(key + i);
    for (unsigned i = 0; i < WORDS; i++)
        sum = mix(sum ^ words[i]);
    words[6] = sum;
}

static off_t place(uint64_t seq)
{
    return (off_t)(RECORDS_AT + (seq - 1) * RECORD);
}

/* Commit a request; the answer goes to `out`. */
static void transact(uint64_t client, uint64_t request, char *out, size_t size)
{
    pthread_mutex_lock(&log_.lock);
    struct entry entry = {log_.count + 1, client, request};
    if (entry.seq > log_.capacity) {
        snprintf(out, size, "error full: there is room for %" PRIu64 " records", log_.capacity);
        goto out;
    }
    build(log_.record, &entry);
    for (size_t d = 0; d < disk_count; d++) {
        if (!disks[d].writable)
            continue;
        ssize_t n = pwrite(disks[d].fd, log_.record, RECORD, place(entry.seq));
        if (n != RECORD || fdatasync(disks[d].fd)) {
            /* Not counted: the next request takes this sequence number and this place. */
            snprintf(out, size, "error disk %.7s slot %" PRIu64 ": %s", disks[d].name, entry.seq, strerror(errno));
            goto out;
        }
    }
    log_.table[log_.count] = entry;
    __atomic_store_n(&log_.count, entry.seq, __ATOMIC_RELEASE);
    snprintf(out, size, "%" PRIu64, entry.seq);
out:
    pthread_mutex_unlock(&log_.lock);
}

uint64_t record_count(void)
{
    return __atomic_load_n(&log_.count, __ATOMIC_ACQUIRE); /* not held up by a disk */
}

static int send_all(int fd, const char *data, size_t size)
{
    for (ssize_t n; size > 0; data += n, size -= (size_t)n)
        if ((n = send(fd, data, size, MSG_NOSIGNAL)) < 0)
            return -1;
    return 0;
}

static int dump(int fd)
{
    char text[4096];
    uint64_t count = record_count(); /* what is below it does not change any more */
    size_t used = (size_t)snprintf(text, sizeof text, "count=%" PRIu64 "\n", count);
    for (uint64_t i = 0; i < count; i++) {
        const struct entry *entry = &log_.table[i];
        if (used > sizeof text - 80) {
            if (send_all(fd, text, used))
                return -1;
            used = 0;
        }
        used += (size_t)snprintf(text + used, sizeof text - used, "%" PRIu64 " %" PRIu64 " %" PRIu64 "\n", entry->seq,
                                 entry->client, entry->request);
    }
    return send_all(fd, text, used);
}

/* Compare the records of one disk with memory, [from, to) of them. 0, or the answer in `out`. */
static int compare(const struct disk *disk, uint64_t from, uint64_t to, uint64_t *buffer, char *out, size_t size)
{
    uint64_t expected[WORDS];
    while (from < to) {
        size_t part = to - from < CHUNK / RECORD ? (size_t)(to - from) : CHUNK / RECORD;
        ssize_t n = pread(disk->fd, buffer, part * RECORD, place(from + 1));
        if (n != (ssize_t)(part * RECORD)) {
            snprintf(out, size, "error disk %.7s slot %" PRIu64 " cannot be read: %s", disk->name, from + 1,
                     n < 0 ? strerror(errno) : "end of disk");
            return -1;
        }
        for (size_t i = 0; i < part; i++, from++) {
            build(expected, &log_.table[from]);
            if (log_.table[from].seq != from + 1 || memcmp(expected, buffer + i * WORDS, RECORD)) {
                snprintf(out, size, "error disk %.7s slot %" PRIu64 " does not hold what memory does", disk->name,
                         from + 1);
                return -1;
            }
        }
    }
    return 0;
}

/* Is there, behind the last record, one of this boot that memory does not know? */
static int runs_ahead(const struct disk *disk, uint64_t *buffer, char *out, size_t size)
{
    uint64_t count = log_.count;
    if (count >= log_.capacity || pread(disk->fd, buffer, RECORD, place(count + 1)) != RECORD)
        return 0;
    if (memcmp(buffer, "PMT-LAB-RECORD\0", 16) || buffer[2] != count + 1 || buffer[5] != page.boot)
        return 0;
    snprintf(out, size, "error disk %.7s slot %" PRIu64 " holds a record that memory does not know", disk->name,
             count + 1);
    return -1;
}

static void verify_disks(char *out, size_t size)
{
    uint64_t *buffer = io_buffer(CHUNK), count = record_count();
    int bad = !buffer;
    snprintf(out, size, bad ? "error no memory" : "ok %" PRIu64, count);
    for (size_t d = 0; d < disk_count && !bad; d++) {
        if (!disks[d].writable)
            continue;
        bad = compare(&disks[d], 0, count, buffer, out, size);
        if (!bad) {
            pthread_mutex_lock(&log_.lock);
            bad = runs_ahead(&disks[d], buffer, out, size);
            pthread_mutex_unlock(&log_.lock);
        }
    }
    if (buffer)
        munmap(buffer, CHUNK);
}

void *transaction_client(void *argument)
{
    int fd = (int)(intptr_t)argument, failed = 0;
    char line[128], answer[128], end;
    FILE *f = fdopen(fd, "r");
    while (f && !failed && fgets(line, sizeof line, f)) {
        uint64_t client, request;
        if (!strcmp(line, "D\n")) {
            failed = dump(fd);
            continue;
        }
        if (sscanf(line, "T %" SCNu64 " %" SCNu64 "%c", &client, &request, &end) == 3 && end == '\n')
            transact(client, request, answer, sizeof answer - 1);
        else if (!strcmp(line, "V\n"))
            verify_disks(answer, sizeof answer - 1);
        else
            snprintf(answer, sizeof answer, "error commands: T CLIENT REQUEST | D | V");
        strcat(answer, "\n");
        failed = send_all(fd, answer, strlen(answer));
    }
    if (f)
        fclose(f);
    return NULL;
}

int start_transactions(void)
{
    log_.capacity = (LOAD_AT - RECORDS_AT) / RECORD;
    for (size_t d = 0; d < disk_count; d++) {
        uint64_t end = disks[d].size < LOAD_AT ? disks[d].size : LOAD_AT;
        uint64_t room = end > RECORDS_AT ? (end - RECORDS_AT) / RECORD : 0;
        if (disks[d].writable && room < log_.capacity)
            log_.capacity = room;
    }
    /* Taken from the kernel, but not yet from memory: that happens as records come. */
    log_.table = io_buffer(log_.capacity * sizeof *log_.table + 1);
    log_.record = io_buffer(RECORD);
    return log_.table && log_.record ? 0 : -1;
}
