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
 * The workload's memory. What each page must hold is known a second time: pages of
 * the dirtier by a shadow table, filled ones by their place. So verify() finds a
 * page that a checkpoint lost, tore or put in the wrong place.
 */
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "workload.h"

#define WORDS (PAGE / 8)
#define MIB (1024u * 1024u)
#define FULL (1ull << 63) /* in the shadow table: the whole page was rewritten */

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

uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

int make_buffer(size_t bytes)
{
    dirt.pages = bytes / PAGE;
    /* A prime that does not divide their number visits all pages, neighbours far apart. */
    dirt.step = dirt.pages % 104729 ? 104729 : 7919;
    dirt.buffer = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    dirt.shadow = calloc(dirt.pages, sizeof *dirt.shadow);
    if (dirt.buffer == MAP_FAILED || !dirt.shadow) {
        dirt.pages = 0;
        return -1;
    }
    /* In huge pages one write would dirty 2 MiB in the guest's own eyes. */
    madvise(dirt.buffer, bytes, MADV_NOHUGEPAGE);
    memset(dirt.buffer, 1, bytes);
    return 0;
}

/* What page `index` holds after its write number `sequence`: word `word` of it. */
static uint64_t content(uint64_t sequence, size_t index, unsigned word)
{
    return mix(sequence ^ mix(index * WORDS + word));
}

/* All in turn; skewed, eight of ten times one of the first sixteenth, drawn at random. */
static size_t next_page(void)
{
    uint64_t drawn = mix(dirt.sequence);
    if (dirty_skew && drawn % 10 < 8)
        return drawn / 10 % (dirt.pages < 16 ? 1 : dirt.pages / 16);
    size_t index = dirt.position;
    dirt.position = (index + dirt.step) % dirt.pages;
    return index;
}

void dirty(size_t count, int full)
{
    if (!dirt.pages)
        return;
    while (count > 0) {
        /* Short holds of the lock, so that verify and bursts can take turns. */
        size_t part = count > 4096 ? 4096 : count;
        count -= part;
        pthread_mutex_lock(&dirt.lock);
        while (part-- > 0) {
            size_t index = next_page();
            uint64_t *target = dirt.buffer + index * WORDS;
            uint64_t sequence = ++dirt.sequence;
            if (full)
                for (unsigned w = 1; w < WORDS; w++)
                    target[w] = content(sequence, index, w);
            target[0] = content(sequence, index, 0);
            dirt.shadow[index] = full ? sequence | FULL : sequence;
        }
        pthread_mutex_unlock(&dirt.lock);
    }
}

long verify(size_t *checked)
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

int fill(size_t mib)
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

size_t buffer_pages(void)
{
    return dirt.pages;
}

size_t filled_mib(void)
{
    return filled.chunks;
}
