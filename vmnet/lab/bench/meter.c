/*
 * meter: what a benchmark measures through a pair of sockets. One static binary.
 *
 *   meter serve PORT                     UDP: echoes datagrams of 64 octets, counts those of 65; TCP: accepts and closes
 *   meter rtt HOST PORT COUNT            one 64-octet datagram at a time: round-trip times
 *   meter packets HOST PORT SECONDS      datagrams of 65 octets as fast as one core sends them; how many arrived,
 *                                      and what each cost its sender (the path to the receiver runs in its context)
 *   meter connect HOST PORT COUNT        TCP connections, one after another: opened, closed by the server, read to the end
 *
 * IPv4 and IPv6. The result is one JSON object. Times are of CLOCK_MONOTONIC, in microseconds.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ECHO 64
#define COUNT 65
#define ASK 66 /* how many of COUNT came since the last question */
#define BURST 64
#define MOST_REFUSED 20

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void fail(const char *what) {
    fprintf(stderr, "meter: %s: %s\n", what, strerror(errno));
    exit(1);
}

static socklen_t address_of(const char *host, const char *port, struct sockaddr_storage *address) {
    struct sockaddr_in *four = (struct sockaddr_in *)address;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)address;
    memset(address, 0, sizeof *address);
    if (inet_pton(AF_INET, host, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons((uint16_t)atoi(port));
        return sizeof *four;
    }
    memset(address, 0, sizeof *address);
    six->sin6_family = AF_INET6;
    six->sin6_port = htons((uint16_t)atoi(port));
    if (inet_pton(AF_INET6, host, &six->sin6_addr) != 1) {
        errno = EINVAL;
        fail(host);
    }
    return sizeof *six;
}

/* -1 when it was refused, which is counted; without a place to count that ends the program. */
static int open_socket(const char *host, const char *port, int type, int *refused) {
    struct sockaddr_storage address;
    struct timeval patience = {2, 0};
    socklen_t size = address_of(host, port, &address);
    int found = socket(address.ss_family, type | SOCK_CLOEXEC, 0);
    if (found < 0)
        fail(host);
    if (connect(found, (struct sockaddr *)&address, size) < 0) {
        if (errno != ECONNREFUSED || !refused || ++*refused > MOST_REFUSED)
            fail(host);
        close(found);
        return -1;
    }
    setsockopt(found, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return found;
}

static int listening(int type, const char *port) {
    struct sockaddr_storage any;
    int yes = 1, no = 0, room = 8 << 20;
    socklen_t size = address_of("::", port, &any);
    int found = socket(AF_INET6, type | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    setsockopt(found, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
    setsockopt(found, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    setsockopt(found, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    if (found < 0 || bind(found, (struct sockaddr *)&any, size) < 0 || (type == SOCK_STREAM && listen(found, 1024) < 0))
        fail(port);
    return found;
}

static void serve(const char *port) {
    struct pollfd ready[2] = {{listening(SOCK_DGRAM, port), POLLIN, 0}, {listening(SOCK_STREAM, port), POLLIN, 0}};
    uint64_t arrived = 0;
    for (;;) {
        char data[128];
        if (poll(ready, 2, -1) < 0)
            continue;
        for (;;) {
            struct sockaddr_storage peer;
            socklen_t size = sizeof peer;
            ssize_t length = recvfrom(ready[0].fd, data, sizeof data, 0, (struct sockaddr *)&peer, &size);
            if (length < 0)
                break;
            if (length == COUNT) {
                arrived++;
                continue;
            }
            if (length == ASK) {
                memcpy(data, &arrived, sizeof arrived);
                arrived = 0;
            }
            sendto(ready[0].fd, data, (size_t)length, 0, (struct sockaddr *)&peer, size);
        }
        for (;;) {
            int one = accept(ready[1].fd, NULL, NULL);
            if (one < 0)
                break;
            close(one);
        }
    }
}

static int ascending(const void *left, const void *right) {
    int64_t a = *(const int64_t *)left, b = *(const int64_t *)right;
    return (a > b) - (a < b);
}

static int rtt(const char *host, const char *port, int count) {
    int fd = open_socket(host, port, SOCK_DGRAM, NULL), index, lost = 0, taken = 0;
    int64_t *times = calloc((size_t)count, sizeof *times);
    char data[ECHO] = {0};
    for (index = 0; index < count; index++) {
        int64_t begun = now_ns();
        memcpy(data, &index, sizeof index);
        if (send(fd, data, sizeof data, 0) != sizeof data || recv(fd, data, sizeof data, 0) != sizeof data)
            lost++;
        else
            times[taken++] = now_ns() - begun;
    }
    if (taken == 0)
        fail("no answer");
    qsort(times, (size_t)taken, sizeof *times, ascending);
    printf("{\"count\":%d,\"lost\":%d,\"p50_us\":%.2f,\"p99_us\":%.2f}\n", taken, lost, (double)times[taken / 2] / 1e3,
           (double)times[(size_t)taken * 99 / 100] / 1e3);
    return 0;
}

static uint64_t arrived(int fd) {
    char data[ASK] = {0};
    uint64_t found = 0;
    int tries;
    for (tries = 0; tries < 5; tries++)
        if (send(fd, data, sizeof data, 0) == sizeof data && recv(fd, data, sizeof data, 0) == sizeof data) {
            memcpy(&found, data, sizeof found);
            return found;
        }
    fail("the server does not say how many came");
    return 0;
}

static int packets(const char *host, const char *port, double seconds) {
    int fd = open_socket(host, port, SOCK_DGRAM, NULL), index;
    char data[COUNT] = {0};
    uint64_t sent = 0, came;
    struct rusage used;
    double cpu;
    int64_t begun, end, finished;
    arrived(fd);
    begun = now_ns();
    end = begun + (int64_t)(seconds * 1e9);
    while ((finished = now_ns()) < end)
        for (index = 0; index < BURST; index++)
            sent += send(fd, data, sizeof data, 0) == sizeof data;
    came = arrived(fd);
    getrusage(RUSAGE_SELF, &used);
    cpu = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) * 1e6 + (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec);
    printf("{\"sent\":%llu,\"arrived\":%llu,\"per_second\":%.0f,\"sender_cpu_us\":%.3f}\n", (unsigned long long)sent,
           (unsigned long long)came, (double)came / ((double)(finished - begun) / 1e9), cpu / (double)(sent ? sent : 1));
    return 0;
}

static int connections(const char *host, const char *port, int count) {
    int64_t begun = now_ns();
    int opened = 0, refused = 0;
    while (opened < count) {
        struct linger none = {1, 0};
        char octet;
        /* A port that is used again at once meets, now and then, what is left of the connection before: on any path,
           a bare veth too, about once in 25,000. */
        int fd = open_socket(host, port, SOCK_STREAM, &refused);
        if (fd < 0)
            continue;
        opened++;
        if (recv(fd, &octet, 1, 0) != 0)
            fail("the server did not close");
        /* No TIME_WAIT here. */
        setsockopt(fd, SOL_SOCKET, SO_LINGER, &none, sizeof none);
        close(fd);
    }
    printf("{\"opened\":%d,\"refused\":%d,\"per_second\":%.0f}\n", opened, refused, (double)opened / ((double)(now_ns() - begun) / 1e9));
    return 0;
}

int main(int count, char **arguments) {
    if (count == 3 && !strcmp(arguments[1], "serve"))
        serve(arguments[2]);
    if (count == 5 && !strcmp(arguments[1], "rtt"))
        return rtt(arguments[2], arguments[3], atoi(arguments[4]));
    if (count == 5 && !strcmp(arguments[1], "packets"))
        return packets(arguments[2], arguments[3], atof(arguments[4]));
    if (count == 5 && !strcmp(arguments[1], "connect"))
        return connections(arguments[2], arguments[3], atoi(arguments[4]));
    fputs("usage: meter serve PORT | rtt HOST PORT COUNT | packets HOST PORT SECONDS | connect HOST PORT COUNT\n", stderr);
    return 2;
}
