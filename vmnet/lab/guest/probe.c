/*
 * probe: traffic, names and commands, for the guests, pods and hosts of the lab. One static binary.
 *
 *   probe serve [--rate BYTES]                 UDP echo :7007, TCP sink :7008, paced TCP source :7009
 *   probe udp HOST PORT RATE SECONDS           RATE echo probes a second; what came back, and every gap
 *   probe send HOST PORT SECONDS [RATE]        TCP stream to HOST, RATE octets a second
 *   probe receive HOST PORT SECONDS            TCP stream from HOST
 *   probe resolve NAME A|AAAA|PTR              names by /etc/resolv.conf, one value a line
 *   probe frames INTERFACE                     sends each line of standard input, a whole frame in hex
 *   probe agent [--listen PATH]                runs commands for the host (see vmnet/lab/guest/agent.py)
 *
 * The result is one JSON object on one line; with --json-lines progress comes before it, a line a second. SIGTERM, SIGINT
 * or a line "stop" on standard input ends a run early; the result covers what was done until then.
 * Times are of CLOCK_MONOTONIC, in milliseconds.
 */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <arpa/nameser.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <resolv.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NOTABLE_GAP_MS 20.0
#define MAX_GAPS 1000
#define DEFAULT_RATE (256 * 1024)
#define TICK_NS 10000000LL

static volatile sig_atomic_t stopping;
static int json_lines;

static void on_signal(int number) {
    (void)number;
    stopping = 1;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static double wall(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static double ms(int64_t nanoseconds) {
    return (double)nanoseconds / 1e6;
}

static void fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("probe: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    exit(2);
}

static void *grow(void *memory, size_t size) {
    void *result = realloc(memory, size);
    if (result == NULL)
        fail("out of memory");
    return result;
}

/* A line "stop" on standard input; end of file means nothing: it is what a background process has. */
static void read_stop(struct pollfd *input) {
    char text[64];
    ssize_t count;
    if (input->fd < 0 || !(input->revents & (POLLIN | POLLHUP | POLLERR | POLLNVAL)))
        return;
    count = read(input->fd, text, sizeof text - 1);
    if (count <= 0) {
        if (count == 0 || (errno != EAGAIN && errno != EINTR))
            input->fd = -1;
        return;
    }
    text[count] = 0;
    if (strstr(text, "stop") != NULL)
        stopping = 1;
}

static void wait_for(struct pollfd *descriptors, nfds_t count, int64_t until) {
    int64_t left = until - now_ns();
    struct timespec timeout;
    if (left < 0)
        left = 0;
    timeout.tv_sec = left / 1000000000LL;
    timeout.tv_nsec = left % 1000000000LL;
    if (ppoll(descriptors, count, &timeout, NULL) < 0) {
        nfds_t index;
        for (index = 0; index < count; index++)
            descriptors[index].revents = 0;
    }
}

/* ---- gaps ---- */

struct gap {
    double at_ms, ms, wall;
};

struct gaps {
    int64_t start, last;
    double longest;
    size_t count;
    struct gap notable[MAX_GAPS];
};

static struct gaps gaps;

static void gaps_begin(void) {
    gaps.start = gaps.last = now_ns();
}

/* Progress at `at`: what lies between it and the progress before it is a gap. */
static void gaps_progress(int64_t at) {
    double gap = ms(at - gaps.last);
    if (at <= gaps.last)
        return;
    if (gap > gaps.longest)
        gaps.longest = gap;
    if (gap > NOTABLE_GAP_MS && gaps.count < MAX_GAPS) {
        struct gap *entry = &gaps.notable[gaps.count++];
        entry->at_ms = ms(gaps.last - gaps.start);
        entry->ms = gap;
        entry->wall = wall() - gap / 1e3;
    }
    gaps.last = at;
}

static void gaps_print(void) {
    size_t index;
    printf("\"longest_gap_ms\":%.3f,\"gaps\":[", gaps.longest);
    for (index = 0; index < gaps.count; index++)
        printf("%s{\"at_ms\":%.3f,\"ms\":%.3f,\"wall\":%.3f}", index ? "," : "", gaps.notable[index].at_ms,
               gaps.notable[index].ms, gaps.notable[index].wall);
    printf("]");
}

/* ---- names ---- */

static int lookup(const char *name, int type, char results[][NI_MAXHOST], int most) {
    unsigned char answer[4096];
    ns_msg message;
    int length, index, count = 0;
    length = res_search(name, ns_c_in, type, answer, sizeof answer);
    if (length < 0 || ns_initparse(answer, length, &message) < 0)
        return 0;
    for (index = 0; index < ns_msg_count(message, ns_s_an) && count < most; index++) {
        ns_rr record;
        if (ns_parserr(&message, ns_s_an, index, &record) < 0 || (int)ns_rr_type(record) != type)
            continue;
        if (type == ns_t_a && ns_rr_rdlen(record) == 4)
            inet_ntop(AF_INET, ns_rr_rdata(record), results[count++], NI_MAXHOST);
        else if (type == ns_t_aaaa && ns_rr_rdlen(record) == 16)
            inet_ntop(AF_INET6, ns_rr_rdata(record), results[count++], NI_MAXHOST);
        else if (type == ns_t_ptr &&
                 dn_expand(answer, answer + length, ns_rr_rdata(record), results[count], NI_MAXHOST) >= 0)
            count++;
    }
    return count;
}

static void reverse_name(const char *text, char *name, size_t size) {
    struct in_addr four;
    struct in6_addr six;
    const unsigned char *octets;
    int index;
    if (inet_pton(AF_INET, text, &four) == 1) {
        octets = (const unsigned char *)&four;
        snprintf(name, size, "%d.%d.%d.%d.in-addr.arpa", octets[3], octets[2], octets[1], octets[0]);
    } else if (inet_pton(AF_INET6, text, &six) == 1) {
        name[0] = 0;
        for (index = 15; index >= 0; index--)
            snprintf(name + strlen(name), size - strlen(name), "%x.%x.", six.s6_addr[index] & 15,
                     six.s6_addr[index] >> 4);
        snprintf(name + strlen(name), size - strlen(name), "ip6.arpa");
    } else {
        snprintf(name, size, "%s", text);
    }
}

static int resolve(int count, char **arguments) {
    char results[16][NI_MAXHOST], name[NI_MAXHOST];
    int type, found, index;
    if (count != 2)
        fail("usage: probe resolve NAME A|AAAA|PTR");
    type = !strcasecmp(arguments[1], "A") ? ns_t_a : !strcasecmp(arguments[1], "AAAA") ? ns_t_aaaa : ns_t_ptr;
    if (type == ns_t_ptr && strcasecmp(arguments[1], "PTR"))
        fail("%s is not A, AAAA or PTR", arguments[1]);
    if (type == ns_t_ptr)
        reverse_name(arguments[0], name, sizeof name);
    else
        snprintf(name, sizeof name, "%s", arguments[0]);
    if (res_init() < 0)
        fail("/etc/resolv.conf cannot be read");
    _res.retrans = 2;
    _res.retry = 2;
    found = lookup(name, type, results, 16);
    for (index = 0; index < found; index++)
        printf("%s\n", results[index]);
    if (found == 0) {
        fprintf(stderr, "probe: %s %s: %s\n", arguments[1], name, hstrerror(h_errno));
        return 1;
    }
    return 0;
}

static socklen_t address_of(const char *host, const char *port, struct sockaddr_storage *address) {
    struct sockaddr_in *four = (struct sockaddr_in *)address;
    struct sockaddr_in6 *six = (struct sockaddr_in6 *)address;
    char results[1][NI_MAXHOST];
    int number = atoi(port);
    memset(address, 0, sizeof *address);
    if (number < 1 || number > 65535)
        fail("%s is not a port", port);
    if (inet_pton(AF_INET, host, &four->sin_addr) != 1 && inet_pton(AF_INET6, host, &six->sin6_addr) != 1) {
        if (res_init() == 0 && (lookup(host, ns_t_a, results, 1) || lookup(host, ns_t_aaaa, results, 1)))
            return address_of(results[0], port, address);
        fail("%s: no such address or name", host);
    }
    memset(address, 0, sizeof *address);
    if (inet_pton(AF_INET, host, &four->sin_addr) == 1) {
        four->sin_family = AF_INET;
        four->sin_port = htons((uint16_t)number);
        return sizeof *four;
    }
    inet_pton(AF_INET6, host, &six->sin6_addr);
    six->sin6_family = AF_INET6;
    six->sin6_port = htons((uint16_t)number);
    return sizeof *six;
}

/* ---- probe udp ---- */

#define MAGIC 0x766d6e70u

struct packet {
    uint32_t magic, run;
    uint64_t sequence;
    int64_t sent;
    char padding[40];
};

/* Round-trip times in steps of 10 µs up to 2 s, the last step for all above. */
#define RTT_STEP_NS 10000
#define RTT_STEPS 200000

struct echo {
    uint64_t sent, received, duplicates, reordered, errors, highest;
    unsigned char *seen;
    size_t seen_size;
    uint32_t *rtt;
};

static double percentile(const struct echo *echo, double share) {
    uint64_t wanted = (uint64_t)((double)echo->received * share), sum = 0;
    size_t index;
    for (index = 0; index < RTT_STEPS; index++) {
        sum += echo->rtt[index];
        if (sum > wanted)
            break;
    }
    return ((double)index + 0.5) * RTT_STEP_NS / 1e6;
}

static void echo_reply(struct echo *echo, const struct packet *packet, int64_t at) {
    size_t byte = packet->sequence / 8;
    unsigned char bit = (unsigned char)(1u << (packet->sequence % 8));
    int64_t step = (at - packet->sent) / RTT_STEP_NS;
    if (byte >= echo->seen_size || packet->sequence >= echo->sent)
        return;
    if (echo->seen[byte] & bit) {
        echo->duplicates++;
        return;
    }
    echo->seen[byte] |= bit;
    echo->received++;
    if (echo->received > 1 && packet->sequence < echo->highest)
        echo->reordered++;
    else
        echo->highest = packet->sequence;
    echo->rtt[step < 0 ? 0 : step >= RTT_STEPS ? RTT_STEPS - 1 : step]++;
    gaps_progress(at);
}

static void echo_print(const struct echo *echo, int done) {
    printf("{\"%s\":\"udp\",\"sent\":%llu,\"received\":%llu,\"lost\":%llu,\"duplicates\":%llu,\"reordered\":%llu,"
           "\"errors\":%llu,\"duration_ms\":%.3f,",
           done ? "result" : "progress", (unsigned long long)echo->sent, (unsigned long long)echo->received,
           (unsigned long long)(echo->sent - echo->received), (unsigned long long)echo->duplicates,
           (unsigned long long)echo->reordered, (unsigned long long)echo->errors, ms(now_ns() - gaps.start));
    if (done) {
        if (echo->received)
            printf("\"rtt_p50_ms\":%.3f,\"rtt_p99_ms\":%.3f,", percentile(echo, 0.5), percentile(echo, 0.99));
        else
            printf("\"rtt_p50_ms\":null,\"rtt_p99_ms\":null,");
        gaps_print();
    } else {
        printf("\"longest_gap_ms\":%.3f", gaps.longest);
    }
    printf("}\n");
    fflush(stdout);
}

static int udp(int count, char **arguments) {
    struct sockaddr_storage address;
    struct packet packet, reply;
    struct pollfd descriptors[2];
    struct echo echo;
    socklen_t size;
    int64_t interval, next, end, report, last_sent = 0, drain = 0;
    double rate, seconds;
    int socket_fd;
    if (count != 4)
        fail("usage: probe udp HOST PORT RATE SECONDS");
    rate = atof(arguments[2]);
    seconds = atof(arguments[3]);
    if (rate <= 0 || rate > 100000 || seconds <= 0)
        fail("rate must be 1 to 100000 a second, and seconds more than 0");
    size = address_of(arguments[0], arguments[1], &address);
    socket_fd = socket(address.ss_family, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (socket_fd < 0 || connect(socket_fd, (struct sockaddr *)&address, size) < 0)
        fail("%s: %s", arguments[0], strerror(errno));
    memset(&echo, 0, sizeof echo);
    echo.rtt = calloc(RTT_STEPS, sizeof *echo.rtt);
    memset(&packet, 0, sizeof packet);
    packet.magic = MAGIC;
    packet.run = (uint32_t)getpid() ^ (uint32_t)now_ns();
    interval = (int64_t)(1e9 / rate);
    descriptors[0].fd = socket_fd;
    descriptors[0].events = POLLIN;
    descriptors[1].fd = 0;
    descriptors[1].events = POLLIN;
    gaps_begin();
    next = gaps.start;
    end = gaps.start + (int64_t)(seconds * 1e9);
    report = gaps.start + 1000000000LL;
    for (;;) {
        int64_t now = now_ns();
        if (drain == 0 && (stopping || now >= end))
            drain = now + 500000000LL;
        if (drain && (now >= drain || echo.received == echo.sent))
            break;
        if (!drain && now >= next) {
            if (echo.sent / 8 >= echo.seen_size) {
                echo.seen = grow(echo.seen, echo.seen_size + 4096);
                memset(echo.seen + echo.seen_size, 0, 4096);
                echo.seen_size += 4096;
            }
            packet.sequence = echo.sent;
            packet.sent = now;
            /* A refused or unroutable probe is a lost one: count it and go on. */
            if (send(socket_fd, &packet, sizeof packet, 0) < 0)
                echo.errors++;
            echo.sent++;
            last_sent = now;
            next += interval;
            if (now - next > 50000000LL) /* this process itself stood still: no burst */
                next = now + interval;
        }
        wait_for(descriptors, 2, drain ? drain : next < end ? next : end);
        read_stop(&descriptors[1]);
        for (;;) {
            ssize_t length = recv(socket_fd, &reply, sizeof reply, 0);
            if (length < 0 && errno != EAGAIN && errno != EINTR) {
                echo.errors++;
                continue;
            }
            if (length < 0)
                break;
            if (length == sizeof reply && reply.magic == MAGIC && reply.run == packet.run)
                echo_reply(&echo, &reply, now_ns());
        }
        if (json_lines && now >= report && !drain) {
            echo_print(&echo, 0);
            report += 1000000000LL;
        }
    }
    /* A silence that lasted to the end is a gap too. */
    if (last_sent > gaps.last && echo.received != echo.sent)
        gaps_progress(last_sent);
    echo_print(&echo, 1);
    return 0;
}

/* ---- probe send, probe receive ---- */

struct stream {
    const char *kind;
    uint64_t bytes;
    int resets, errors;
    char message[128];
};

static void stream_print(const struct stream *stream, int done) {
    printf("{\"%s\":\"%s\",\"bytes\":%llu,\"resets\":%d,\"errors\":%d,\"reconnects\":0,\"duration_ms\":%.3f,",
           done ? "result" : "progress", stream->kind, (unsigned long long)stream->bytes, stream->resets,
           stream->errors, ms(now_ns() - gaps.start));
    if (done) {
        if (stream->message[0])
            printf("\"error\":\"%s\",", stream->message);
        gaps_print();
    } else {
        printf("\"longest_gap_ms\":%.3f", gaps.longest);
    }
    printf("}\n");
    fflush(stdout);
}

static void stream_error(struct stream *stream, int number) {
    if (number == ECONNRESET || number == EPIPE || number == ECONNREFUSED)
        stream->resets++;
    else
        stream->errors++;
    snprintf(stream->message, sizeof stream->message, "%s", strerror(number));
}

static uint64_t acknowledged(int socket_fd, uint64_t written) {
    int queued = 0;
    if (ioctl(socket_fd, SIOCOUTQ, &queued) < 0 || (uint64_t)queued > written)
        return 0;
    return written - (uint64_t)queued;
}

static int stream(int count, char **arguments, int sending) {
    static char data[65536];
    struct sockaddr_storage address;
    struct pollfd descriptors[2];
    struct stream stream;
    socklen_t size;
    int64_t end, next, report, connecting;
    uint64_t written = 0, rate;
    int socket_fd, over = 0;
    if (count < 3 || count > (sending ? 4 : 3))
        fail("usage: probe %s HOST PORT SECONDS%s", sending ? "send" : "receive", sending ? " [RATE]" : "");
    rate = count == 4 ? (uint64_t)atoll(arguments[3]) : DEFAULT_RATE;
    memset(&stream, 0, sizeof stream);
    stream.kind = sending ? "send" : "receive";
    size = address_of(arguments[0], arguments[1], &address);
    socket_fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (socket_fd < 0)
        fail("socket: %s", strerror(errno));
    gaps_begin();
    end = gaps.start + (int64_t)(atof(arguments[2]) * 1e9);
    descriptors[0].fd = socket_fd;
    descriptors[1].fd = 0;
    descriptors[1].events = POLLIN;
    connecting = gaps.start + 10000000000LL;
    if (connect(socket_fd, (struct sockaddr *)&address, size) < 0) {
        int error = errno;
        if (error == EINPROGRESS) {
            socklen_t length = sizeof error;
            descriptors[0].events = POLLOUT;
            descriptors[0].revents = 0;
            while (!stopping && !descriptors[0].revents && now_ns() < connecting) {
                wait_for(descriptors, 2, connecting);
                read_stop(&descriptors[1]);
            }
            if (!descriptors[0].revents)
                error = stopping ? EINTR : ETIMEDOUT;
            else
                getsockopt(socket_fd, SOL_SOCKET, SO_ERROR, &error, &length);
        }
        if (error) {
            stream_error(&stream, error);
            over = 1;
        }
    }
    gaps_begin(); /* the time of connecting is not a stall of the stream */
    next = gaps.start;
    report = gaps.start + 1000000000LL;
    while (!over && !stopping && now_ns() < end) {
        int64_t now = now_ns();
        if (sending) {
            uint64_t wanted = rate ? (uint64_t)((double)(now - gaps.start) / 1e9 * (double)rate) + 1 : UINT64_MAX;
            uint64_t acked;
            /* What the pause of a stalled stream would have carried is not made up for. */
            if (rate && wanted > written + 65536)
                wanted = written + 65536;
            while (written < wanted) {
                size_t piece = wanted - written > sizeof data ? sizeof data : (size_t)(wanted - written);
                ssize_t done = send(socket_fd, data, piece, MSG_NOSIGNAL);
                if (done < 0) {
                    if (errno != EAGAIN && errno != EINTR) {
                        stream_error(&stream, errno);
                        over = 1;
                    }
                    break;
                }
                written += (uint64_t)done;
            }
            acked = acknowledged(socket_fd, written);
            if (acked > stream.bytes) {
                stream.bytes = acked;
                gaps_progress(now_ns());
            }
            next = now + TICK_NS / 2;
            descriptors[0].events = 0;
        } else {
            next = now + 20 * TICK_NS;
            descriptors[0].events = POLLIN;
        }
        wait_for(descriptors, 2, next);
        read_stop(&descriptors[1]);
        if (sending) {
            int error = 0;
            socklen_t length = sizeof error;
            if (descriptors[0].revents & (POLLERR | POLLHUP)) {
                getsockopt(socket_fd, SOL_SOCKET, SO_ERROR, &error, &length);
                stream_error(&stream, error ? error : EPIPE);
                over = 1;
            }
        } else if (descriptors[0].revents) {
            ssize_t done = recv(socket_fd, data, sizeof data, 0);
            if (done > 0) {
                stream.bytes += (uint64_t)done;
                gaps_progress(now_ns());
            } else if (done == 0) {
                snprintf(stream.message, sizeof stream.message, "the other side closed the connection");
                stream.errors++;
                over = 1;
            } else if (errno != EAGAIN && errno != EINTR) {
                stream_error(&stream, errno);
                over = 1;
            }
        }
        if (json_lines && now >= report) {
            stream_print(&stream, 0);
            report += 1000000000LL;
        }
    }
    if (!over) /* a silence that lasted to the end is a gap too */
        gaps_progress(now_ns());
    stream_print(&stream, 1);
    return stream.resets || stream.errors ? 1 : 0;
}

/* ---- probe serve ---- */

#define MAX_CLIENTS 256

static int listener(int type, int port) {
    struct sockaddr_in6 six;
    struct sockaddr_in four;
    int on = 1, off = 0;
    int socket_fd = socket(AF_INET6, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    memset(&six, 0, sizeof six);
    six.sin6_family = AF_INET6;
    six.sin6_port = htons((uint16_t)port);
    if (socket_fd >= 0) {
        setsockopt(socket_fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
        setsockopt(socket_fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
        if (bind(socket_fd, (struct sockaddr *)&six, sizeof six) == 0)
            goto bound;
        close(socket_fd);
    }
    socket_fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    memset(&four, 0, sizeof four);
    four.sin_family = AF_INET;
    four.sin_port = htons((uint16_t)port);
    setsockopt(socket_fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (socket_fd < 0 || bind(socket_fd, (struct sockaddr *)&four, sizeof four) < 0)
        fail("port %d: %s", port, strerror(errno));
bound:
    if (type == SOCK_STREAM && listen(socket_fd, 64) < 0)
        fail("port %d: %s", port, strerror(errno));
    return socket_fd;
}

/* Reply from the address that was asked: hosts here may have several. */
static void echo_one(int socket_fd) {
    static char data[65536];
    char control[256];
    struct sockaddr_storage from;
    struct iovec part = {data, sizeof data};
    struct msghdr message;
    struct cmsghdr *header;
    ssize_t length;
    memset(&message, 0, sizeof message);
    message.msg_name = &from;
    message.msg_namelen = sizeof from;
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    length = recvmsg(socket_fd, &message, 0);
    if (length < 0)
        return;
    part.iov_len = (size_t)length;
    for (header = CMSG_FIRSTHDR(&message); header != NULL; header = CMSG_NXTHDR(&message, header)) {
        if (header->cmsg_level == IPPROTO_IPV6 && header->cmsg_type == IPV6_PKTINFO) {
            struct in6_pktinfo *info = (struct in6_pktinfo *)CMSG_DATA(header);
            if (!IN6_IS_ADDR_LINKLOCAL(&info->ipi6_addr))
                info->ipi6_ifindex = 0;
        }
    }
    sendmsg(socket_fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
}

struct client {
    int fd, source;
    int64_t since;
    uint64_t written;
};

static int serve(int count, char **arguments) {
    static char data[65536];
    struct pollfd descriptors[3 + MAX_CLIENTS];
    struct client clients[MAX_CLIENTS];
    uint64_t rate = DEFAULT_RATE;
    int used = 0, sources = 0, on = 1, index;
    int64_t next = 0;
    if (count == 2 && !strcmp(arguments[0], "--rate"))
        rate = (uint64_t)atoll(arguments[1]);
    else if (count)
        fail("usage: probe serve [--rate BYTES]");
    descriptors[0].fd = listener(SOCK_DGRAM, 7007);
    descriptors[1].fd = listener(SOCK_STREAM, 7008);
    descriptors[2].fd = listener(SOCK_STREAM, 7009);
    setsockopt(descriptors[0].fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof on);
    printf("{\"serving\":[7007,7008,7009]}\n");
    fflush(stdout);
    while (!stopping) {
        int64_t now = now_ns();
        for (index = 0; index < 3; index++)
            descriptors[index].events = POLLIN;
        for (index = 0; index < used; index++) {
            descriptors[3 + index].fd = clients[index].fd;
            descriptors[3 + index].events = POLLIN;
        }
        if (next < now)
            next = now + TICK_NS;
        wait_for(descriptors, (nfds_t)(3 + used), sources ? next : now + 1000000000LL);
        now = now_ns();
        for (index = used - 1; index >= 0; index--) {
            struct client *client = &clients[index];
            int gone = 0;
            if (descriptors[3 + index].revents) {
                ssize_t length = recv(client->fd, data, sizeof data, 0);
                gone = length == 0 || (length < 0 && errno != EAGAIN && errno != EINTR);
            }
            if (!gone && client->source) {
                uint64_t wanted = (uint64_t)((double)(now - client->since) / 1e9 * (double)rate);
                if (wanted > client->written + 65536) { /* a stall is not made up for */
                    client->since = now - (int64_t)((double)client->written / (double)rate * 1e9);
                    wanted = client->written + (uint64_t)((double)rate / 100) + 1;
                }
                while (!gone && client->written < wanted) {
                    size_t piece = wanted - client->written > sizeof data ? sizeof data
                                                                          : (size_t)(wanted - client->written);
                    ssize_t done = send(client->fd, data, piece, MSG_NOSIGNAL | MSG_DONTWAIT);
                    if (done < 0) {
                        gone = errno != EAGAIN && errno != EINTR;
                        break;
                    }
                    client->written += (uint64_t)done;
                }
            }
            if (gone) {
                sources -= client->source;
                close(client->fd);
                clients[index] = clients[--used];
            }
        }
        if (descriptors[0].revents)
            for (index = 0; index < 16; index++)
                echo_one(descriptors[0].fd);
        for (index = 1; index < 3; index++) {
            int fd;
            if (!descriptors[index].revents)
                continue;
            fd = accept4(descriptors[index].fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd < 0)
                continue;
            if (used == MAX_CLIENTS) {
                close(fd);
                continue;
            }
            memset(&clients[used], 0, sizeof clients[used]);
            clients[used].fd = fd;
            clients[used].source = index == 2;
            clients[used].since = now;
            sources += clients[used].source;
            used++;
        }
    }
    return 0;
}

/* ---- probe agent ---- */

/*
 * Lines. Host to guest: "<request> <operation> <field>…", fields percent-encoded ("%" alone: an empty field).
 * Guest to host: "<request> <json>". Jobs carry names the host chose, so that a request repeated after a reconnection
 * (the guest may have moved to another QEMU meanwhile) does nothing twice.
 *
 *   ping                          {"ok":true}
 *   start JOB TIMEOUT_MS ARG…     {"job":"JOB"}            a timeout of 0 is none
 *   poll JOB OUT ERR WAIT_MS      {"state":"running"|"exited","exit":N,"out":base64,"err":base64,"out_total":N,…}
 *                                 waits up to WAIT_MS for the end; OUT and ERR say from which octet on
 *   input JOB FROM DATA           {"taken":N}              DATA starts at octet FROM of its standard input
 *   input JOB                     {"ok":true}              end of its standard input
 *   stop JOB SIGNAL               {"ok":true}
 *   forget JOB                    {"ok":true}
 */

#define MAX_JOBS 128
#define MAX_WAITS 64
#define MAX_LINE (256 * 1024)
#define MAX_OUTPUT (8 * 1024 * 1024)
#define CHUNK 24576
#define MAX_FIELDS 256

struct buffer {
    char *data;
    size_t used, size;
};

struct job {
    char name[64];
    pid_t pid;
    int input, pipes[2], reaped, status;
    size_t taken;
    int64_t deadline, reaped_at;
    struct buffer output[2];
};

struct waiting {
    char request[64], job[64];
    size_t from[2];
    int64_t until;
};

static struct job jobs[MAX_JOBS];
static struct waiting waits[MAX_WAITS];
static size_t job_count, wait_count;
static struct buffer outgoing;
static int child_pipe[2];

static void append(struct buffer *buffer, const void *data, size_t size) {
    if (buffer->used + size > buffer->size) {
        buffer->size = (buffer->used + size) * 2;
        buffer->data = grow(buffer->data, buffer->size);
    }
    memcpy(buffer->data + buffer->used, data, size);
    buffer->used += size;
}

static void append_text(struct buffer *buffer, const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    append(buffer, text, strlen(text));
}

static void append_base64(struct buffer *buffer, const char *data, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t index;
    for (index = 0; index < size; index += 3) {
        size_t left = size - index;
        uint32_t group = (uint32_t)(unsigned char)data[index] << 16;
        char text[4];
        if (left > 1)
            group |= (uint32_t)(unsigned char)data[index + 1] << 8;
        if (left > 2)
            group |= (uint32_t)(unsigned char)data[index + 2];
        text[0] = digits[group >> 18];
        text[1] = digits[(group >> 12) & 63];
        text[2] = left > 1 ? digits[(group >> 6) & 63] : '=';
        text[3] = left > 2 ? digits[group & 63] : '=';
        append(buffer, text, 4);
    }
}

static void reply_error(const char *request, const char *message) {
    append_text(&outgoing, "%s {\"error\":\"%s\"}\n", request, message);
}

static void reply_ok(const char *request) {
    append_text(&outgoing, "%s {\"ok\":true}\n", request);
}

static struct job *find_job(const char *name) {
    size_t index;
    for (index = 0; index < job_count; index++)
        if (!strcmp(jobs[index].name, name))
            return &jobs[index];
    return NULL;
}

static void on_child(int number) {
    int saved = errno;
    (void)number;
    (void)!write(child_pipe[1], "", 1);
    errno = saved;
}

static void close_job(struct job *job) {
    int index;
    for (index = 0; index < 2; index++) {
        if (job->pipes[index] >= 0)
            close(job->pipes[index]);
        free(job->output[index].data);
    }
    if (job->input >= 0)
        close(job->input);
    *job = jobs[--job_count];
}

static void start_job(const char *request, const char *name, long timeout, char **arguments) {
    struct job *job = find_job(name);
    int in[2], out[2], error[2];
    if (job != NULL) {
        append_text(&outgoing, "%s {\"job\":\"%s\"}\n", request, name);
        return;
    }
    if (job_count == MAX_JOBS) {
        reply_error(request, "too many jobs");
        return;
    }
    if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(error, O_CLOEXEC) < 0) {
        reply_error(request, "no pipes left");
        return;
    }
    job = &jobs[job_count];
    memset(job, 0, sizeof *job);
    snprintf(job->name, sizeof job->name, "%s", name);
    job->pid = fork();
    if (job->pid == 0) {
        sigset_t none;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        signal(SIGCHLD, SIG_DFL);
        signal(SIGPIPE, SIG_DFL);
        signal(SIGTERM, SIG_DFL);
        signal(SIGINT, SIG_DFL);
        setsid();
        dup2(in[0], 0);
        dup2(out[1], 1);
        dup2(error[1], 2);
        execvp(arguments[0], arguments);
        fprintf(stderr, "%s: %s\n", arguments[0], strerror(errno));
        _exit(errno == ENOENT ? 127 : 126);
    }
    close(in[0]);
    close(out[1]);
    close(error[1]);
    if (job->pid < 0) {
        close(in[1]);
        close(out[0]);
        close(error[0]);
        reply_error(request, "fork failed");
        return;
    }
    job->input = in[1];
    job->pipes[0] = out[0];
    job->pipes[1] = error[0];
    fcntl(job->input, F_SETFL, O_NONBLOCK);
    fcntl(job->pipes[0], F_SETFL, O_NONBLOCK);
    fcntl(job->pipes[1], F_SETFL, O_NONBLOCK);
    job->deadline = timeout > 0 ? now_ns() + timeout * 1000000LL : 0;
    job_count++;
    append_text(&outgoing, "%s {\"job\":\"%s\"}\n", request, name);
}

static int job_over(const struct job *job) {
    return job->reaped && job->pipes[0] < 0 && job->pipes[1] < 0;
}

static void reply_poll(const char *request, const struct job *job, const size_t *from) {
    static const char *const keys[] = {"out", "err"};
    int index;
    int code = WIFSIGNALED(job->status) ? 128 + WTERMSIG(job->status) : WEXITSTATUS(job->status);
    append_text(&outgoing, "%s {\"state\":\"%s\",\"exit\":", request, job_over(job) ? "exited" : "running");
    append_text(&outgoing, job_over(job) ? "%d" : "null", code);
    for (index = 0; index < 2; index++) {
        const struct buffer *output = &job->output[index];
        size_t start = from[index] < output->used ? from[index] : output->used;
        size_t size = output->used - start < CHUNK ? output->used - start : CHUNK;
        append_text(&outgoing, ",\"%s_total\":%zu,\"%s\":\"", keys[index], output->used, keys[index]);
        append_base64(&outgoing, output->data + start, size);
        append_text(&outgoing, "\"");
    }
    append_text(&outgoing, "}\n");
}

static void decode_field(char *field) {
    char *to = field;
    while (*field) {
        if (field[0] == '%' && isxdigit((unsigned char)field[1]) && isxdigit((unsigned char)field[2])) {
            char digits[3] = {field[1], field[2], 0};
            *to++ = (char)strtol(digits, NULL, 16);
            field += 3;
        } else if (field[0] == '%') {
            field++;
        } else {
            *to++ = *field++;
        }
    }
    *to = 0;
}

static void handle_line(char *line) {
    char *fields[MAX_FIELDS + 1], *save = NULL, *word;
    const char *request, *operation;
    struct job *job = NULL;
    int count = 0;
    for (word = strtok_r(line, " \r", &save); word != NULL && count < MAX_FIELDS; word = strtok_r(NULL, " \r", &save)) {
        decode_field(word);
        fields[count++] = word;
    }
    fields[count] = NULL;
    if (count < 2)
        return; /* what is left of a line that a reconnection cut */
    request = fields[0];
    operation = fields[1];
    if (strlen(request) >= sizeof waits[0].request)
        return;
    if (!strcmp(operation, "ping")) {
        reply_ok(request);
        return;
    }
    if (count < 3 || strlen(fields[2]) >= sizeof job->name) {
        reply_error(request, "which job?");
        return;
    }
    if (!strcmp(operation, "start") && count >= 5) {
        start_job(request, fields[2], atol(fields[3]), &fields[4]);
        return;
    }
    job = find_job(fields[2]);
    if (job == NULL && !strcmp(operation, "forget")) {
        reply_ok(request);
    } else if (job == NULL) {
        reply_error(request, "no such job");
    } else if (!strcmp(operation, "poll") && count == 6) {
        struct waiting *waiting = &waits[wait_count];
        size_t from[2] = {(size_t)atoll(fields[3]), (size_t)atoll(fields[4])};
        long wait = atol(fields[5]);
        if (job_over(job) || wait <= 0 || wait_count == MAX_WAITS) {
            reply_poll(request, job, from);
            return;
        }
        snprintf(waiting->request, sizeof waiting->request, "%s", request);
        snprintf(waiting->job, sizeof waiting->job, "%s", fields[2]);
        waiting->from[0] = from[0];
        waiting->from[1] = from[1];
        waiting->until = now_ns() + wait * 1000000LL;
        wait_count++;
    } else if (!strcmp(operation, "input") && count == 5) {
        size_t from = (size_t)atoll(fields[3]), size = strlen(fields[4]);
        if (job->input >= 0 && from <= job->taken && from + size > job->taken) {
            ssize_t done = write(job->input, fields[4] + (job->taken - from), from + size - job->taken);
            if (done > 0)
                job->taken += (size_t)done;
            else if (done < 0 && errno != EAGAIN) /* it does not want more */
                job->taken = from + size;
        } else if (job->input < 0) {
            job->taken = from + size;
        }
        append_text(&outgoing, "%s {\"taken\":%zu}\n", request, job->taken);
    } else if (!strcmp(operation, "input") && count == 3) {
        if (job->input >= 0)
            close(job->input);
        job->input = -1;
        reply_ok(request);
    } else if (!strcmp(operation, "stop") && count == 4) {
        if (!job->reaped)
            kill(-job->pid, atoi(fields[3]));
        reply_ok(request);
    } else if (!strcmp(operation, "forget")) {
        if (!job->reaped)
            kill(-job->pid, SIGKILL);
        if (job->reaped)
            close_job(job);
        reply_ok(request);
    } else {
        reply_error(request, "unknown operation");
    }
}

static void read_job(struct job *job, int which) {
    char data[16384];
    struct buffer *output = &job->output[which];
    for (;;) {
        ssize_t length = read(job->pipes[which], data, sizeof data);
        if (length > 0) {
            size_t room = MAX_OUTPUT - output->used;
            append(output, data, (size_t)length < room ? (size_t)length : room);
        } else if (length < 0 && (errno == EAGAIN || errno == EINTR)) {
            return;
        } else {
            close(job->pipes[which]);
            job->pipes[which] = -1;
            return;
        }
    }
}

static void reap(void) {
    int status;
    pid_t pid;
    size_t index;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        for (index = 0; index < job_count; index++)
            if (jobs[index].pid == pid && !jobs[index].reaped) {
                jobs[index].reaped = 1;
                jobs[index].status = status;
                jobs[index].reaped_at = now_ns();
            }
}

/* The port's device node has no fixed name without udev. */
static int open_port(const char *name) {
    DIR *directory = opendir("/sys/class/virtio-ports");
    struct dirent *entry;
    int found = -1;
    if (directory == NULL)
        return -1;
    while (found < 0 && (entry = readdir(directory)) != NULL) {
        char path[512], text[128] = "";
        FILE *file;
        if (entry->d_name[0] == '.')
            continue;
        snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
        file = fopen(path, "r");
        if (file == NULL)
            continue;
        if (fgets(text, sizeof text, file) != NULL)
            text[strcspn(text, "\n")] = 0;
        fclose(file);
        if (strcmp(text, name))
            continue;
        snprintf(path, sizeof path, "/dev/%s", entry->d_name);
        found = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    }
    closedir(directory);
    return found;
}

static int agent(int count, char **arguments) {
    static struct pollfd descriptors[3 + 2 * MAX_JOBS];
    struct buffer incoming = {0};
    int port = -1, listening = -1, absent = 0;
    size_t index;
    if (count == 2 && !strcmp(arguments[0], "--listen")) {
        struct sockaddr_un address;
        memset(&address, 0, sizeof address);
        address.sun_family = AF_UNIX;
        snprintf(address.sun_path, sizeof address.sun_path, "%s", arguments[1]);
        listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        unlink(arguments[1]);
        if (listening < 0 || bind(listening, (struct sockaddr *)&address, sizeof address) < 0 || listen(listening, 4) < 0)
            fail("%s: %s", arguments[1], strerror(errno));
    } else if (count) {
        fail("usage: probe agent [--listen PATH]");
    } else {
        port = open_port("vmnet.agent");
        if (port < 0)
            fail("no virtio-serial port is called vmnet.agent");
    }
    if (pipe2(child_pipe, O_CLOEXEC | O_NONBLOCK) < 0)
        fail("pipe: %s", strerror(errno));
    signal(SIGCHLD, on_child);
    while (!stopping) {
        int64_t now = now_ns(), until = now + 1000000000LL;
        nfds_t used = 2;
        char data[16384];
        size_t places[2 * MAX_JOBS];
        descriptors[0].fd = child_pipe[0];
        descriptors[0].events = POLLIN;
        descriptors[1].fd = absent ? -1 : port >= 0 ? port : listening;
        descriptors[1].events = (short)(POLLIN | (outgoing.used && port >= 0 ? POLLOUT : 0));
        for (index = 0; index < 2 * job_count; index++) {
            if (jobs[index / 2].pipes[index % 2] < 0)
                continue;
            places[used - 2] = index;
            descriptors[used].fd = jobs[index / 2].pipes[index % 2];
            descriptors[used].events = POLLIN;
            used++;
        }
        for (index = 0; index < wait_count; index++)
            if (waits[index].until < until)
                until = waits[index].until;
        for (index = 0; index < job_count; index++) {
            if (jobs[index].deadline && !jobs[index].reaped && jobs[index].deadline < until)
                until = jobs[index].deadline;
            if (jobs[index].reaped && !job_over(&jobs[index]) && jobs[index].reaped_at + 200000000LL < until)
                until = jobs[index].reaped_at + 200000000LL;
        }
        /* Nobody holds the host's end: the port reads as hung up at once, so look again a little later. */
        if (absent && now + 50000000LL < until)
            until = now + 50000000LL;
        wait_for(descriptors, used, until);
        now = now_ns();
        absent = 0;
        if (descriptors[0].revents)
            while (read(child_pipe[0], data, sizeof data) > 0)
                continue;
        reap();
        for (index = 2; index < used; index++)
            if (descriptors[index].revents)
                read_job(&jobs[places[index - 2] / 2], (int)(places[index - 2] % 2));
        for (index = 0; index < job_count; index++) {
            struct job *job = &jobs[index];
            if (job->deadline && !job->reaped && now >= job->deadline) {
                kill(-job->pid, SIGKILL);
                job->deadline = 0;
            }
            /* A child that went to the background may hold the pipes for ever. */
            if (job->reaped && !job_over(job) && now >= job->reaped_at + 200000000LL) {
                int which;
                for (which = 0; which < 2; which++)
                    if (job->pipes[which] >= 0) {
                        read_job(job, which);
                        if (job->pipes[which] >= 0)
                            close(job->pipes[which]);
                        job->pipes[which] = -1;
                    }
            }
        }
        if (port < 0 && listening >= 0) {
            port = accept4(listening, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            incoming.used = outgoing.used = 0;
        }
        if (port >= 0) {
            ssize_t length = read(port, data, sizeof data);
            if (length > 0) {
                char *line, *end;
                append(&incoming, data, (size_t)length);
                line = incoming.data;
                while ((end = memchr(line, '\n', incoming.used - (size_t)(line - incoming.data))) != NULL) {
                    *end = 0;
                    handle_line(line);
                    line = end + 1;
                }
                incoming.used -= (size_t)(line - incoming.data);
                memmove(incoming.data, line, incoming.used);
                if (incoming.used > MAX_LINE)
                    incoming.used = 0;
            } else if (length == 0 || (errno != EAGAIN && errno != EINTR)) {
                incoming.used = outgoing.used = wait_count = 0;
                if (listening >= 0) {
                    close(port);
                    port = -1;
                } else {
                    absent = 1;
                }
            }
        }
        now = now_ns();
        for (index = wait_count; index-- > 0;) {
            struct job *job = find_job(waits[index].job);
            if (job != NULL && !job_over(job) && now < waits[index].until)
                continue;
            if (job == NULL)
                reply_error(waits[index].request, "no such job");
            else
                reply_poll(waits[index].request, job, waits[index].from);
            waits[index] = waits[--wait_count];
        }
        while (outgoing.used && port >= 0 && !absent) {
            ssize_t length = write(port, outgoing.data, outgoing.used < 32768 ? outgoing.used : 32768);
            if (length <= 0)
                break;
            outgoing.used -= (size_t)length;
            memmove(outgoing.data, outgoing.data + length, outgoing.used);
        }
    }
    return 0;
}

/* Frames as they are given, whatever the kernel would make of them. */
static int frames(int count, char **arguments) {
    struct sockaddr_ll to;
    static char line[8192];
    unsigned char frame[sizeof line / 2];
    int found, sent = 0;
    if (count != 1)
        fail("usage: probe frames INTERFACE");
    memset(&to, 0, sizeof to);
    to.sll_family = AF_PACKET;
    to.sll_ifindex = (int)if_nametoindex(arguments[0]);
    found = socket(AF_PACKET, SOCK_RAW, 0);
    if (!to.sll_ifindex || found < 0)
        fail("%s: %s", arguments[0], strerror(errno));
    while (fgets(line, sizeof line, stdin) != NULL) {
        size_t size = 0;
        unsigned int byte;
        while (sscanf(line + 2 * size, "%2x", &byte) == 1)
            frame[size++] = (unsigned char)byte;
        if (size == 0)
            continue;
        if (sendto(found, frame, size, 0, (struct sockaddr *)&to, sizeof to) < 0)
            fail("frame %d: %s", sent + 1, strerror(errno));
        sent++;
    }
    printf("{\"sent\": %d}\n", sent);
    close(found);
    return 0;
}

int main(int count, char **arguments) {
    struct sigaction action;
    int kept = 1, index;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
    for (index = 1; index < count; index++) {
        if (!strcmp(arguments[index], "--json-lines"))
            json_lines = 1;
        else
            arguments[kept++] = arguments[index];
    }
    arguments[kept] = NULL;
    count = kept;
    if (count < 2)
        fail("usage: probe serve|udp|send|receive|resolve|frames|agent …");
    if (!strcmp(arguments[1], "serve"))
        return serve(count - 2, arguments + 2);
    if (!strcmp(arguments[1], "udp"))
        return udp(count - 2, arguments + 2);
    if (!strcmp(arguments[1], "send"))
        return stream(count - 2, arguments + 2, 1);
    if (!strcmp(arguments[1], "receive"))
        return stream(count - 2, arguments + 2, 0);
    if (!strcmp(arguments[1], "resolve"))
        return resolve(count - 2, arguments + 2);
    if (!strcmp(arguments[1], "frames"))
        return frames(count - 2, arguments + 2);
    if (!strcmp(arguments[1], "agent"))
        return agent(count - 2, arguments + 2);
    fail("%s is not serve, udp, send, receive, resolve, frames or agent", arguments[1]);
    return 2;
}
