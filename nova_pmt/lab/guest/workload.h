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
 */
#ifndef NOVA_PMT_LAB_WORKLOAD_H
#define NOVA_PMT_LAB_WORKLOAD_H

#include <stddef.h>
#include <stdint.h>
#include <time.h>

#define PAGE 4096u

/* The counter page. Offsets are part of the contract with the host's side. */
struct counter_page {
    char magic[16];
    volatile uint64_t counter; /* 16 */
    uint64_t boot;             /* 24: random, differs after each boot */
    volatile uint64_t rounds;  /* 32: dirty rounds done */
    char pad[PAGE - 40];
};
extern struct counter_page page;

/* Rates; written by the control server, read by the loops. */
extern volatile unsigned tick_ms, console_every, dirty_pages, dirty_ms, dirty_full, dirty_skew;

/* workload.c */
void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* on the console */
void sleep_to_next(struct timespec *at, unsigned ms); /* a schedule without drift */
void start(void *(*function)(void *), void *argument); /* a thread that nobody waits for */

/* init.c: mount what must be mounted, load the virtio modules, start the network. */
void start_machine(void);

/* dhcp.c: ask for an address, as "10.77.2.100/24"; 0, or -1 with errno. The interface is up. */
int ask_for_address(const char *interface, char *address, size_t size);

/* memory.c: pages that are rewritten, pages that stay, and what they must hold. */
int make_buffer(size_t bytes);
void dirty(size_t count, int full);
int fill(size_t mib); /* take so much more and keep it, full of data that does not compress */
long verify(size_t *checked); /* the first wrong page, or -1 */
size_t buffer_pages(void);
size_t filled_mib(void);
uint64_t mix(uint64_t x); /* splitmix64: cheap, and looks random to a compressor */

/* disks.c: what there is, by the host's names (vda, sda), and load beside the records. */
#define MAX_DISKS 16
#define LOAD_AT (48ull << 20) /* records of transactions lie below, load above */
struct disk {
    char name[8];
    int fd; /* O_DIRECT */
    int writable;
    uint64_t size;
};
extern struct disk disks[MAX_DISKS];
extern size_t disk_count;
void find_disks(void);
void *io_buffer(size_t bytes); /* whole pages, zero, or NULL */
void disk_command(const char *line, char *out, size_t size);

/* transactions.c: a transactional server on port 7001. */
int start_transactions(void);
void *transaction_client(void *connection);
uint64_t record_count(void);

/* traffic.c: sink (port 9) and source (port 19) of TCP streams, datagrams. */
void *sink_client(void *connection);
void *source_client(void *connection);
uint64_t sunk_bytes(void);
void packets_command(const char *line, int connection, char *out, size_t size);

/* server.c: TCP echo on port 7, line commands on port 7000, and the servers above. */
void serve_all(void);

#endif
