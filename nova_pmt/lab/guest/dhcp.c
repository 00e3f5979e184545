/*    Licensed under the Apache License, Version 2.0 (the "License"); you may
 *    not use this file except in compliance with the License. You may obtain
 *    a copy of the License at
 *
 *         http://www.apache.org/licenses/LICENSE-2.0
 *
 *    Unless required by applicable law or agreed to in writing, software
 *    distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
 *    WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
 *    License for the specific language governing permissions and limitations
 *    under the License.
 *
 * An address by DHCP, for guests of a cloud: asked for once, at boot. Leases of the lab's networks
 * are longer than any lab lives, so nothing renews them.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "workload.h"

enum { DISCOVER = 1, OFFER, REQUEST, DECLINE, ACK };
enum { MASK = 1, ADDRESS = 50, KIND = 53, SERVER = 54, END = 255 };

struct message {
    uint8_t op, hardware, hardware_size, hops;
    uint32_t id;
    uint16_t seconds, flags;
    uint32_t client, yours, server, relay;
    uint8_t mac[16], name[64], file[128];
    uint32_t magic;
    uint8_t options[312];
} __attribute__((packed));

static const uint32_t MAGIC = 0x63825363;

/* The value of an option of at least `size` bytes; NULL if it is not there. */
static const uint8_t *find(const struct message *message, size_t length, uint8_t code, size_t size)
{
    size_t end = length - offsetof(struct message, options);
    for (size_t at = 0; at + 1 < end && message->options[at] != END;) {
        size_t value = message->options[at + 1];
        if (!message->options[at]) {
            at++; /* padding */
            continue;
        }
        if (message->options[at] == code && value >= size && at + 2 + value <= end)
            return message->options + at + 2;
        at += 2 + value;
    }
    return NULL;
}

static uint8_t *put(uint8_t *at, uint8_t code, const void *value, uint8_t size)
{
    *at++ = code;
    *at++ = size;
    memcpy(at, value, size);
    return at + size;
}

/* Send a message of one kind and wait for the answer that belongs to it; its length, or 0. */
static size_t ask(int fd, struct message *query, uint8_t kind, const struct message *offer,
                  const uint8_t *server, struct message *answer, uint8_t wanted)
{
    const struct sockaddr_in all = {
        .sin_family = AF_INET, .sin_port = htons(67), .sin_addr.s_addr = INADDR_BROADCAST};
    uint8_t *at = put(query->options, KIND, &kind, 1);
    if (offer) {
        at = put(at, ADDRESS, &offer->yours, 4);
        at = put(at, SERVER, server, 4);
    }
    at = put(at, 55, (uint8_t[]){MASK, SERVER}, 2);
    *at = END;
    if (sendto(fd, query, sizeof *query, 0, (const void *)&all, sizeof all) < 0)
        return 0;
    for (;;) {
        ssize_t length = recv(fd, answer, sizeof *answer, 0);
        if (length < 0)
            return 0; /* in time nothing came */
        if ((size_t)length <= offsetof(struct message, options) || answer->id != query->id ||
            answer->magic != htonl(MAGIC))
            continue;
        const uint8_t *found = find(answer, length, KIND, 1);
        if (found && *found == wanted)
            return length;
    }
}

int ask_for_address(const char *name, char *address, size_t size)
{
    struct ifreq request = {0};
    struct message query = {.op = 1, .hardware = 1, .hardware_size = 6, .flags = htons(0x8000)};
    struct message offer, answer;
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(68)};
    struct timeval wait = {.tv_usec = 500000};
    int on = 1, result = -1, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", name);
    if (fd < 0 || ioctl(fd, SIOCGIFHWADDR, &request) ||
        setsockopt(fd, SOL_SOCKET, SO_BROADCAST, &on, sizeof on) ||
        setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, name, strlen(name) + 1) ||
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait) ||
        bind(fd, (const void *)&here, sizeof here))
        goto out;
    memcpy(query.mac, request.ifr_hwaddr.sa_data, 6);
    memcpy(&query.id, query.mac + 2, 4);
    query.magic = htonl(MAGIC);
    errno = ETIMEDOUT;
    /* The network's ports may come some time after the guest: two minutes. */
    for (int try = 0; try < 240 && result; try++) {
        size_t length = ask(fd, &query, DISCOVER, NULL, NULL, &offer, OFFER);
        const uint8_t *server = length ? find(&offer, length, SERVER, 4) : NULL;
        if (!server || !(length = ask(fd, &query, REQUEST, &offer, server, &answer, ACK)))
            continue;
        const uint8_t *mask = find(&answer, length, MASK, 4);
        uint32_t bits = 0xffffff00;
        if (mask) {
            memcpy(&bits, mask, 4);
            bits = ntohl(bits);
        }
        snprintf(address, size, "%s/%d", inet_ntoa((struct in_addr){answer.yours}),
                 __builtin_popcount(bits));
        result = 0;
    }
out:
    if (fd >= 0)
        close(fd);
    return result;
}
