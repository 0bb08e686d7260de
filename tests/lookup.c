/* What a C library finds by its own resolver: the addresses of each name, one a line, or "none". */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
int main(int count, char **words) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    char text[64];
    for (int at = 1; at < count; at++) {
        if (getaddrinfo(words[at], 0, &hints, &found)) { puts("none"); continue; }
        for (; found; found = found->ai_next) {
            getnameinfo(found->ai_addr, found->ai_addrlen, text, sizeof text, 0, 0, NI_NUMERICHOST);
            puts(text);
        }
    }
    return 0;
}
