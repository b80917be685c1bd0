// Paced publisher: one Redis command for each event, pipelined, one line of JSON at the end.
//
//   sse_pub --redis 127.0.0.1:6379 --streams 500 --per-stream 200 --rate 10000 -- XADD s:{i} * d {p}
//
// Event k goes to stream first + k % streams, at start + k/rate, in ticks of 1 ms; with rate 0 as fast as the window of
// outstanding replies allows. In the command's arguments {i} is the stream's number, {x} the same as 32 hex digits,
// {n} the event's number in its stream, {s} that plus --seq, and {p} its data:
// {"text":"ts:<CLOCK_MONOTONIC ns>,n:<n>,abc…"}, of --size bytes, stamped when the command is written.
//
// A reply that is an array must begin with OK: the append script's answers do.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <getopt.h>
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

static int fd, streams = 1, first, per_stream = 100, seq, size = 120, window = 1000, n_args;
static double rate, timeout_s = 60;
static char **args, *redis_address = "", error[160];
static uint64_t sent, replies, errors;

static char *out;
static size_t out_len, out_cap, out_sent;
static char in[1 << 18];
static size_t in_len;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void put(const char *p, size_t n) {
    if (out_len + n > out_cap) {
        out_cap = (out_len + n) * 2;
        out = realloc(out, out_cap);
    }
    memcpy(out + out_len, p, n);
    out_len += n;
}

static size_t make_data(char *p, uint64_t n) {
    int len = sprintf(p, "{\"text\":\"ts:%lu,n:%lu,", now(), n);
    while (len < size - 2) p[len] = 'a' + len % 26, len++;
    memcpy(p + len, "\"}", 3);
    return len + 2;
}

static void emit(uint64_t k) {
    char data[8192], arg[16384], head[32];
    int stream = first + k % streams;
    uint64_t n = k / streams;
    size_t data_len = make_data(data, n);
    put(head, sprintf(head, "*%d\r\n", n_args));
    for (int a = 0; a < n_args; a++) {
        size_t len = 0;
        for (const char *t = args[a]; *t && len + data_len + 40 < sizeof arg;) {
            char what = t[0] == '{' && t[1] && t[2] == '}' ? t[1] : 0;
            if (what == 'i') len += sprintf(arg + len, "%d", stream);
            else if (what == 'x') len += sprintf(arg + len, "%032x", stream);
            else if (what == 'n') len += sprintf(arg + len, "%lu", n);
            else if (what == 's') len += sprintf(arg + len, "%lu", n + seq);
            else if (what == 'p') memcpy(arg + len, data, data_len), len += data_len;
            else what = 0, arg[len++] = *t;
            t += what ? 3 : 1;
        }
        put(head, sprintf(head, "$%zu\r\n", len));
        put(arg, len);
        put("\r\n", 2);
    }
    sent++;
}

static void flush(void) {
    while (out_sent < out_len) {
        ssize_t n = send(fd, out + out_sent, out_len - out_sent, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0) {
            if (errno == EAGAIN) return;
            perror("send");
            exit(1);
        }
        out_sent += n;
    }
    out_len = out_sent = 0;
}

static void note_error(const char *text, size_t n) {
    errors++;
    if (error[0]) return;
    snprintf(error, sizeof error, "%.*s", (int)n, text);
    for (char *p = error; *p; p++)
        if (*p == '"' || *p == '\\' || (unsigned char)*p < ' ') *p = ' ';
}

// The length of the RESP2 value at p, arrays and what is in them included; 0 when it is not all there yet.
static size_t value(const char *p, size_t n) {
    const char *nl = n ? memmem(p, n, "\r\n", 2) : NULL;
    if (!nl) return 0;
    size_t len = nl - p + 2;
    long count = *p == '$' || *p == '*' ? atol(p + 1) : -1;
    if (*p == '$' && count >= 0) len += count + 2;
    for (; *p == '*' && count > 0; count--) {
        size_t item = value(p + len, n - len);
        if (!item) return 0;
        len += item;
    }
    return len <= n ? len : 0;
}

static void parse(void) {
    size_t at = 0, len;
    while ((len = value(in + at, in_len - at))) {
        const char *p = in + at;
        if (*p == '-') note_error(p, len - 2);
        else if (*p == '*' && !memmem(p, len < 12 ? len : 12, "\r\n$2\r\nOK\r\n", 10)) note_error(p, len);
        replies++;
        at += len;
    }
    memmove(in, in + at, in_len - at);
    in_len -= at;
}

static void pump(int ms) {
    flush();
    struct pollfd p = {.fd = fd, .events = POLLIN | (out_len ? POLLOUT : 0)};
    if (poll(&p, 1, ms) <= 0) return;
    if (p.revents & (POLLIN | POLLHUP | POLLERR)) {
        ssize_t n = recv(fd, in + in_len, sizeof in - in_len, MSG_DONTWAIT);
        if (n == 0) {
            fprintf(stderr, "Redis closed the connection\n");
            exit(1);
        }
        if (n > 0) {
            in_len += n;
            parse();
        }
    }
    flush();
}

static void parse_options(int argc, char **argv) {
    static struct option options[] = {
        {"redis", 1, 0, 'r'},      // 127.x.x.x:port
        {"streams", 1, 0, 's'},
        {"first", 1, 0, 'f'},      // the number of the first stream
        {"per-stream", 1, 0, 'k'}, // events for each stream
        {"seq", 1, 0, 'q'},        // {s} of a stream's first event
        {"rate", 1, 0, 'R'},       // events a second, of all streams
        {"size", 1, 0, 'z'},       // bytes of {p}
        {"window", 1, 0, 'w'},     // commands without a reply
        {"timeout", 1, 0, 't'},    // seconds until all is over
        {0},
    };
    for (int o; (o = getopt_long(argc, argv, "", options, 0)) != -1;) {
        switch (o) {
        case 'r': redis_address = optarg; break;
        case 's': streams = atoi(optarg); break;
        case 'f': first = atoi(optarg); break;
        case 'k': per_stream = atoi(optarg); break;
        case 'q': seq = atoi(optarg); break;
        case 'R': rate = atof(optarg); break;
        case 'z': size = atoi(optarg); break;
        case 'w': window = atoi(optarg); break;
        case 't': timeout_s = atof(optarg); break;
        default: exit(2);
        }
    }
    args = argv + optind;
    n_args = argc - optind;
    if (!n_args || size > 8000) {
        fprintf(stderr, "a command is missing, or --size is above 8000\n");
        exit(2);
    }
}

static void open_connection(void) {
    char host[64];
    int port, one = 1;
    if (sscanf(redis_address, "%63[0-9.]:%d", host, &port) != 2 || strncmp(host, "127.", 4)) {
        fprintf(stderr, "--redis must be 127.x.x.x:port\n");
        exit(2);
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &address.sin_addr);
    fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) {
        perror("connect");
        exit(1);
    }
}

int main(int argc, char **argv) {
    parse_options(argc, argv);
    open_connection();
    uint64_t total = (uint64_t)streams * per_stream, begin = now(), end = begin + (uint64_t)(timeout_s * 1e9);
    double late = 0;
    for (uint64_t t; sent < total && (t = now()) < end;) {
        uint64_t due = total;
        if (rate > 0) {
            double s = (t - begin) / 1e9;
            if (s * rate + 1 < total) due = s * rate + 1;
            if (sent < due && s - sent / rate > late) late = s - sent / rate;
        }
        while (sent < due && sent - replies < (uint64_t)window) emit(sent);
        pump(sent - replies >= (uint64_t)window ? 5 : rate > 0 ? 1 : 0);
    }
    while (replies < sent && now() < end) pump(5);
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"sent\":%lu,\"replies\":%lu,\"errors\":%lu,\"error\":\"%s\",\"seconds\":%.4f,\"late_ms\":%.2f,", sent,
           replies, errors, error, (now() - begin) / 1e9, late * 1e3);
    printf("\"cpu_s\":%.3f}\n", usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
                                    (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
    return 0;
}
