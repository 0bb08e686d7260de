/* vmnet-cni: the CNI plugin as a static program. It does what vmnet/cni/shim.py does, which explains why; the wire
 * format is described in vmnet/cni/call.py. One suite (tests/unit/cni/test_conformance.py) holds both to the same
 * behaviour. It allocates nothing: what it reads and writes is bounded by MAX_FRAME.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define SOCKET "/run/vmnet/cni.sock"
#define DELETED_DIRECTORY "/run/vmnet/cni-deleted"
#define MAX_FRAME (1 << 20)
#define WAIT 60.0         /* seconds that a request other than DEL waits for the agent to be there */
#define ANSWER_WAIT 120.0 /* seconds for the agent's answer */
#define DEL_WAIT 10.0     /* seconds for the answer to DEL */
#define POLL_MS 50
#define VERSIONS "[\"0.3.0\",\"0.3.1\",\"0.4.0\",\"1.0.0\",\"1.1.0\"]"

static const char *const COMMANDS[] = {"ADD", "DEL", "CHECK", "STATUS", "GC", "VERSION"};
static const char *const VARIABLES[] = {"CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS",
                                        "CNI_IFNAME",  "CNI_ARGS",        "CNI_PATH"};
static char config[MAX_FRAME + 2], answer[MAX_FRAME], frame[4 + MAX_FRAME], output[8192];
static size_t config_size;

struct text { char *at; size_t size, limit; }; /* size > limit: it did not fit */

static void put(struct text *to, const char *from, size_t size) {
    if (to->size + size <= to->limit) memcpy(to->at + to->size, from, size);
    to->size += size;
}

static void put_text(struct text *to, const char *from) { put(to, from, strlen(from)); }

static void put_quoted(struct text *to, const char *from, size_t size) {
    put_text(to, "\"");
    for (size_t i = 0; i < size; i++) {
        char escaped[8];
        unsigned char byte = (unsigned char)from[i];
        if (byte == '"' || byte == '\\' || byte < 0x20)
            put(to, escaped, (size_t)snprintf(escaped, sizeof escaped, "\\u%04x", byte));
        else
            put(to, from + i, 1);
    }
    put_text(to, "\"");
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static const char *variable(const char *name, const char *otherwise) {
    const char *found = getenv(name);
    return found ? found : otherwise;
}

/* Whether the descriptor becomes ready before the deadline. */
static int ready(int descriptor, short events, double deadline) {
    struct pollfd waiting = {descriptor, events, 0};
    double left = deadline - now();
    int found = poll(&waiting, 1, left > 0 ? (int)(left * 1000) + 1 : 0);
    if (found == 0) errno = ETIMEDOUT;
    return found > 0;
}

/* All of it, or 0 with errno: an end before that is ECONNRESET. */
static int receive(int descriptor, char *to, size_t size, double deadline) {
    while (size) {
        if (!ready(descriptor, POLLIN, deadline)) return 0;
        ssize_t found = read(descriptor, to, size);
        if (found <= 0) return found ? 0 : (errno = ECONNRESET, 0);
        to += found, size -= (size_t)found;
    }
    return 1;
}

static int transmit(int descriptor, const char *from, size_t size, double deadline) {
    while (size) {
        if (!ready(descriptor, POLLOUT, deadline)) return 0;
        ssize_t done = send(descriptor, from, size, MSG_NOSIGNAL);
        if (done < 0) return 0;
        from += done, size -= (size_t)done;
    }
    return 1;
}

static int print(const char *from, size_t size) {
    while (size) {
        ssize_t done = write(STDOUT_FILENO, from, size);
        if (done <= 0) return 0;
        from += done, size -= (size_t)done;
    }
    return 1;
}

/* cniVersion of the configuration, a key of the outermost object; 1.1.0 where there is none. */
static const char *version(void) {
    static char found[32];
    int depth = 0;
    for (size_t i = 0; i < config_size; i++) {
        if (strchr("{[", config[i]) && config[i]) depth++;
        if (strchr("}]", config[i]) && config[i]) depth--;
        if (config[i] != '"') continue;
        size_t start = i + 1;
        for (i++; i < config_size && config[i] != '"'; i++)
            if (config[i] == '\\') i++;
        if (depth != 1 || i - start != 10 || memcmp(config + start, "cniVersion", 10)) continue;
        if (sscanf(config + i, "\" : \"%31[0-9A-Za-z.+-]", found) == 1) return found;
    }
    return "1.1.0";
}

static int fail(int code, const char *message, const char *detail) {
    struct text to = {output, 0, sizeof output};
    char number[16];
    put_text(&to, "{\"cniVersion\":");
    put_quoted(&to, version(), strlen(version()));
    put(&to, number, (size_t)snprintf(number, sizeof number, ",\"code\":%d", code));
    put_text(&to, ",\"msg\":");
    put_quoted(&to, message, strlen(message));
    put_text(&to, ",\"details\":");
    put_quoted(&to, detail, strnlen(detail, 1024));
    put_text(&to, "}\n");
    print(output, to.size <= to.limit ? to.size : 0);
    return 1;
}

/* A connection to the agent: an absent one is waited for up to wait seconds, one with a full backlog longer. */
static int reached(int *descriptor, const char *path, double wait, double answer_wait) {
    double start = now();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) return errno = ENAMETOOLONG, 0;
    strcpy(address.sun_path, path);
    for (;;) {
        *descriptor = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (*descriptor < 0) return 0;
        if (connect(*descriptor, (struct sockaddr *)&address, sizeof address) == 0) return 1;
        int error = errno;
        close(*descriptor);
        errno = error;
        if (now() >= start + (error == EAGAIN ? answer_wait : wait)) return 0;
        poll(NULL, 0, POLL_MS);
    }
}

/* The answer's size, 0 with errno when the agent cannot be reached or ends early. */
static size_t exchange(const char *path, size_t size, double wait, double answer_wait) {
    unsigned char head[4] = {0};
    int descriptor;
    if (!reached(&descriptor, path, wait, answer_wait)) return 0;
    for (int i = 0; i < 4; i++) frame[i] = (char)(size >> (24 - 8 * i));
    double deadline = now() + answer_wait;
    if (!transmit(descriptor, frame, 4 + size, deadline) || !receive(descriptor, (char *)head, 4, deadline)) return 0;
    size_t length = (size_t)head[0] << 24 | (size_t)head[1] << 16 | (size_t)head[2] << 8 | head[3];
    if (length < 1 || length > MAX_FRAME) return errno = EBADMSG, 0;
    return receive(descriptor, answer, length, deadline) ? length : 0;
}

/* Tell the agent's next start which interface went away; the file appears complete or not at all. */
static void leave_marker(size_t size) {
    char directory[512], temporary[1024], path[1024];
    const char *container = variable("CNI_CONTAINERID", ""), *interface = variable("CNI_IFNAME", "");
    if (!isalnum((unsigned char)*container)) return;
    for (const char *c = container; *c; c++)
        if (!isalnum((unsigned char)*c) && !strchr("._-", *c)) return;
    if (strchr(interface, '/')) interface = "";
    snprintf(directory, sizeof directory, "%s", variable("VMNET_CNI_DELETED", DELETED_DIRECTORY));
    snprintf(path, sizeof path, "%s/%.200s%s%.16s", directory, container, *interface ? "@" : "", interface);
    snprintf(temporary, sizeof temporary, "%s/.%.200s.%d", directory, container, (int)getpid());
    char *last = strrchr(directory, '/');
    if (last) {
        *last = 0, mkdir(directory, 0755), *last = '/', mkdir(directory, 0755);
    }
    int descriptor = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (descriptor < 0 || write(descriptor, frame + 4, size) != (ssize_t)size || rename(temporary, path))
        /* Not fatal: the agent also compares what it holds with the pods that exist. */
        fprintf(stderr, "vmnet-cni: cannot note the deletion of %s: %s\n", container, strerror(errno));
}

int main(void) {
    const char *command = variable("CNI_COMMAND", ""), *path = variable("VMNET_CNI_SOCKET", SOCKET);
    char message[256];
    double wait = strtod(variable("VMNET_CNI_WAIT", "60"), NULL), deadline = now() + wait;
    for (ssize_t found = 1; found && config_size <= MAX_FRAME; config_size += (size_t)found) {
        found = ready(STDIN_FILENO, POLLIN, deadline)
                    ? read(STDIN_FILENO, config + config_size, MAX_FRAME + 1 - config_size) : -1;
        if (found < 0) return fail(5, "the network configuration cannot be read from standard input", strerror(errno));
    }
    if (config_size > MAX_FRAME) return fail(5, "the network configuration is too large", "");
    size_t known = 0;
    while (known < sizeof COMMANDS / sizeof *COMMANDS && strcmp(command, COMMANDS[known])) known++;
    if (known == sizeof COMMANDS / sizeof *COMMANDS) return fail(4, "CNI_COMMAND is not known", command);
    if (!strcmp(command, "VERSION"))
        return printf("{\"cniVersion\":\"%s\",\"supportedVersions\":" VERSIONS "}\n", version()) < 0;
    int deleting = !strcmp(command, "DEL");
    struct text body = {frame + 4, 0, MAX_FRAME};
    put_text(&body, "{\"environment\":{");
    for (size_t i = 0, count = 0; i < sizeof VARIABLES / sizeof *VARIABLES; i++) {
        const char *value = getenv(VARIABLES[i]);
        if (!value) continue;
        put_text(&body, count++ ? "," : "");
        put_quoted(&body, VARIABLES[i], strlen(VARIABLES[i]));
        put_text(&body, ":");
        put_quoted(&body, value, strlen(value));
    }
    put_text(&body, "},\"config\":");
    put_quoted(&body, config, config_size);
    put_text(&body, "}");
    if (body.size > body.limit) return fail(5, "the network configuration is too large", "");
    size_t size = exchange(path, body.size, deleting ? 0 : wait, deleting ? DEL_WAIT : ANSWER_WAIT);
    if (size) return print(answer + 1, size - 1) ? answer[0] : 1;
    if (deleting) return leave_marker(body.size), 0; /* it must not wait: a node without an agent could never drain */
    snprintf(message, sizeof message, "vmnet agent is not serving on %.150s", path);
    return fail(!strcmp(command, "STATUS") ? 50 : 11, message, strerror(errno));
}
