/*
 * asker: the client of make bench-dns. One static binary.
 *
 *   asker HOST PORT NAMES WINDOW SECONDS SEED      as fast as answers come, WINDOW questions under way at once
 *   asker HOST PORT NAMES 0:RATE SECONDS SEED      RATE questions a second, evenly spaced, whatever comes back
 *
 * NAMES is a file of names, one a line; each question is for one of them by chance, its letters in upper or lower case
 * by chance, type A, with EDNS (1232 octets). An answer counts when its id is under way, its name is spelt as asked, its
 * code is NOERROR and it has a record. A question that is not answered within a second is lost.
 * The result is one JSON object; times in microseconds.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MOST 65536
#define LOST_NS 1000000000LL
#define SAMPLES 4000000

struct name {
    unsigned char wire[256];
    int length;
};

struct asked {
    int64_t at; /* 0: not under way */
    unsigned char wire[256];
    int length;
};

static struct name *names;
static int name_count;
static struct asked *under_way;
static float *samples;
static long sample_count, sent, answered, lost, wrong;
static uint64_t state;

static uint64_t chance(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void fail(const char *what) {
    fprintf(stderr, "asker: %s: %s\n", what, strerror(errno));
    exit(1);
}

static void read_names(const char *path) {
    FILE *file = fopen(path, "r");
    char line[512];
    int room = 0;
    if (!file)
        fail(path);
    while (fgets(line, sizeof line, file)) {
        if (name_count == room && !(names = realloc(names, (size_t)(room = room ? room * 2 : 1024) * sizeof *names)))
            fail("names");
        struct name *name = &names[name_count++];
        name->length = 0;
        for (char *label = strtok(line, ".\n"); label; label = strtok(NULL, ".\n")) {
            size_t length = strlen(label);
            name->wire[name->length++] = (unsigned char)length;
            memcpy(name->wire + name->length, label, length);
            name->length += (int)length;
        }
        name->wire[name->length++] = 0;
    }
    fclose(file);
}

/* -1: no id is free. */
static int ask(int sock, int64_t at) {
    static unsigned id;
    static const unsigned char tail[] = {0, 1, 0, 1, 0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 0};
    unsigned char message[512] = {0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1};
    for (int tries = 0; under_way[id].at; tries++, id = (id + 1) % MOST)
        if (tries == MOST)
            return -1;
    struct asked *question = &under_way[id];
    const struct name *name = &names[chance() % (uint64_t)name_count];
    uint64_t bits = chance();
    question->length = name->length;
    for (int at_octet = 0; at_octet < name->length; at_octet++) {
        unsigned char octet = name->wire[at_octet];
        if (octet >= 'a' && octet <= 'z' && (bits >> (at_octet & 63) & 1))
            octet -= 32;
        question->wire[at_octet] = octet;
    }
    message[0] = (unsigned char)(id >> 8);
    message[1] = (unsigned char)id;
    memcpy(message + 12, question->wire, (size_t)name->length);
    memcpy(message + 12 + name->length, tail, sizeof tail);
    question->at = at;
    if (send(sock, message, 12 + (size_t)name->length + sizeof tail, 0) < 0) {
        question->at = 0;
        if (errno != ECONNREFUSED && errno != EAGAIN && errno != ENOBUFS)
            fail("send");
        return 0;
    }
    sent++;
    id = (id + 1) % MOST;
    return 1;
}

/* How many questions came to an end. */
static int take(int sock) {
    unsigned char message[2048];
    int ended = 0;
    for (;;) {
        ssize_t length = recv(sock, message, sizeof message, MSG_DONTWAIT);
        if (length < 0)
            return ended;
        if (length < 12)
            continue;
        struct asked *question = &under_way[message[0] << 8 | message[1]];
        if (!question->at)
            continue;
        float took = (float)(now_ns() - question->at) / 1000;
        int good = length > 12 + question->length && (message[3] & 15) == 0 && message[2] & 0x80 &&
                   (message[6] << 8 | message[7]) == 1 && !memcmp(message + 12, question->wire, (size_t)question->length);
        question->at = 0;
        ended++;
        if (!good) {
            wrong++;
            continue;
        }
        answered++;
        if (sample_count < SAMPLES)
            samples[sample_count++] = took;
    }
}

static int expire(int64_t now) {
    int ended = 0;
    for (int id = 0; id < MOST; id++)
        if (under_way[id].at && now - under_way[id].at > LOST_NS) {
            under_way[id].at = 0;
            lost++;
            ended++;
        }
    return ended;
}

static int by_value(const void *one, const void *other) {
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

static double share(double part) {
    return sample_count ? samples[(long)((double)(sample_count - 1) * part)] : 0;
}

int main(int count, char **words) {
    if (count != 7) {
        fprintf(stderr, "usage: asker HOST PORT NAMES WINDOW|0:RATE SECONDS SEED\n");
        return 2;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[2]))};
    if (inet_pton(AF_INET, words[1], &address.sin_addr) != 1)
        fail(words[1]);
    int sock = socket(AF_INET, SOCK_DGRAM, 0), room = 4 << 20;
    setsockopt(sock, SOL_SOCKET, SO_RCVBUF, &room, sizeof room);
    if (connect(sock, (struct sockaddr *)&address, sizeof address) < 0)
        fail("connect");
    read_names(words[3]);
    under_way = calloc(MOST, sizeof *under_way);
    samples = calloc(SAMPLES, sizeof *samples);
    if (!under_way || !samples || !name_count)
        fail("memory or names");
    state = strtoull(words[6], NULL, 10) * 2654435761u + 88172645463325252ull;
    int window = atoi(words[4]);
    double rate = words[4][0] == '0' && words[4][1] == ':' ? atof(words[4] + 2) : 0;
    int64_t began = now_ns(), end = began + (int64_t)(atof(words[5]) * 1e9), checked = began;
    double due = 0;
    int open = 0;
    struct pollfd waiting = {.fd = sock, .events = POLLIN};
    for (;;) {
        int64_t now = now_ns();
        if (now >= end)
            break;
        if (now - checked > LOST_NS / 10) {
            open -= expire(now);
            checked = now;
        }
        int wait = 1;
        if (rate > 0) {
            int64_t next = began + (int64_t)(due * 1e9);
            if (next <= now) {
                if (ask(sock, now) > 0)
                    open++;
                due += 1 / rate;
                wait = 0;
            }
            int64_t left = next - now;
            struct timespec pause = {0, left > 0 && left < 1000000 ? left : 1000000};
            if (wait)
                ppoll(&waiting, 1, &pause, NULL);
        } else {
            while (open < window) {
                if (ask(sock, now_ns()) <= 0)
                    break;
                open++;
            }
            poll(&waiting, 1, wait);
        }
        open -= take(sock);
    }
    double seconds = (double)(now_ns() - began) / 1e9;
    int64_t last = now_ns();
    while (open > 0 && now_ns() - last < LOST_NS) {
        poll(&waiting, 1, 10);
        open -= take(sock);
    }
    lost += open;
    qsort(samples, (size_t)sample_count, sizeof *samples, by_value);
    printf("{\"sent\": %ld, \"answered\": %ld, \"wrong\": %ld, \"lost\": %ld, \"seconds\": %.3f, \"per_second\": %.1f, "
           "\"p50_us\": %.1f, \"p99_us\": %.1f}\n",
           sent, answered, wrong, lost, seconds, (double)answered / seconds, share(0.5), share(0.99));
    return 0;
}
