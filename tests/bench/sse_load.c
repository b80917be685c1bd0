// Load client for Server-Sent Events: N connections, one epoll thread, one line of JSON at the end.
//
//   sse_load --url http://127.0.0.1:8000/runs/{x}/stream --n 1000 --streams 10 --expect 2000 --timeout 20
//
// In the URL, the headers and the body {i} is first + connection % streams, and {x} the same as 32 hex digits.
//
// An event is a block with a data: line. A message is an event with ts:<CLOCK_MONOTONIC ns>,n:<number> in a text
// of its data (sse_pub writes them): now - ts is its latency, and n tells what was lost, repeated or out of order.
// A connection is done with --expect messages, or without --expect when its body ends.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum state { IDLE, CONNECTING, HEADERS, BODY, DONE, FAILED };
enum chunk_state { SIZE, EXTENSION, DATA, CRLF, END };

typedef struct {
    int fd, index, status;
    enum state state;
    int chunked, over;
    enum chunk_state chunk;
    uint64_t left;  // bytes left in this chunk, or of Content-Length
    int has_length;
    char *buf;  // a header or a line that is not complete yet
    size_t len, cap;
    int has_data, named;
    int64_t last_n;
    uint32_t events, messages, comments;
    uint64_t t_start, t_first, t_done;
} conn;

static char *url, *method = "GET", *body, *ready_file, *first_name;
static char *headers[16];
static int n_headers, n_conns = 1, streams = 1, first, at_once = 256, sequential, hold;
static uint64_t expect;
static double timeout_s = 30, per_second;

static conn *conns;
static int ep, in_flight, answered, done, failed;
static uint64_t gaps, dups, t_begin, t_ready, t_first, t_last;
static char error[160], path[2048], host_port[128], bytes[1 << 18];
static struct sockaddr_in address;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

// A log-linear histogram: 128 buckets for each power of two, so less than 1 % off.
#define BITS 7
static uint64_t buckets[64 << BITS], latencies;

static void latency(uint64_t ns) {
    latencies++;
    if (ns < 1 << BITS) {
        buckets[ns]++;
        return;
    }
    int e = 63 - __builtin_clzll(ns);
    buckets[((e - BITS + 1) << BITS) + ((ns >> (e - BITS)) & ((1 << BITS) - 1))]++;
}

static double latency_ms(double quantile) {
    uint64_t below = 0, want = quantile * latencies;
    for (int i = 0; i < 64 << BITS; i++) {
        below += buckets[i];
        if (below > want) {
            if (i < 1 << BITS) return i / 1e6;
            int e = (i >> BITS) + BITS - 1;
            return (double)(((1ull << BITS) + (i & ((1 << BITS) - 1))) << (e - BITS)) / 1e6;
        }
    }
    return -1;
}

static void substitute(char *out, size_t size, const char *text, int i) {
    size_t n = 0;
    while (*text && n + 40 < size) {
        if (!strncmp(text, "{i}", 3)) n += snprintf(out + n, size - n, "%d", i), text += 3;
        else if (!strncmp(text, "{x}", 3)) n += snprintf(out + n, size - n, "%032x", i), text += 3;
        else out[n++] = *text++;
    }
    out[n] = 0;
}

static void keep(conn *c, const char *p, size_t n) {
    if (c->len + n + 1 > c->cap) {
        c->cap = (c->len + n + 1) * 2;
        c->buf = realloc(c->buf, c->cap);
    }
    memcpy(c->buf + c->len, p, n);
    c->len += n;
    c->buf[c->len] = 0;
}

static void finish(conn *c, int ok, const char *why) {
    if (c->state == DONE || c->state == FAILED) return;
    if (sequential || c->state == CONNECTING || c->state == HEADERS) in_flight--;
    if (ok) {
        done++;
    } else {
        failed++;
        if (!error[0]) snprintf(error, sizeof error, "connection %d: %s", c->index, why);
    }
    c->t_done = now();
    c->state = ok ? DONE : FAILED;
    if (c->fd >= 0) close(c->fd);
    free(c->buf);
    c->buf = NULL;
    c->cap = c->len = 0;
}

// The number after `key` in [p, e), and what follows it in *rest.
static int number(const char *p, const char *e, const char *key, uint64_t *value, const char **rest) {
    const char *q = memmem(p, e - p, key, strlen(key));
    if (!q) return 0;
    q += strlen(key);
    for (*value = 0; q < e && isdigit((unsigned char)*q); q++) *value = *value * 10 + (*q - '0');
    *rest = q;
    return 1;
}

static void message(conn *c, const char *p, const char *e, uint64_t t) {
    uint64_t ts, n;
    if (!number(p, e, "ts:", &ts, &p) || !number(p, e, "n:", &n, &p)) return;
    latency(t > ts ? t - ts : 0);
    c->messages++;
    if ((int64_t)n <= c->last_n) dups++;
    else gaps += n - c->last_n - 1;
    c->last_n = n;
    t_last = t;
    if (!t_first) t_first = t;
}

static void line(conn *c, const char *p, size_t n, uint64_t t) {
    if (n && p[n - 1] == '\r') n--;
    if (!n) {
        if (c->has_data) {
            c->events++;
            if (!c->t_first && (!first_name || c->named)) c->t_first = t;
        }
        c->has_data = c->named = 0;
    } else if (p[0] == ':') {
        c->comments++;
    } else if (n >= 5 && !memcmp(p, "data:", 5)) {
        c->has_data = 1;
        message(c, p + 5, p + n, t);
    } else if (first_name && n > 7 && !memcmp(p, "event: ", 7)) {
        c->named = n - 7 == strlen(first_name) && !memcmp(p + 7, first_name, n - 7);
    }
}

static void lines(conn *c, const char *p, size_t n, uint64_t t) {
    const char *e = p + n, *nl;
    while (p < e && (nl = memchr(p, '\n', e - p))) {
        if (c->len) {
            keep(c, p, nl - p);
            line(c, c->buf, c->len, t);
            c->len = 0;
        } else {
            line(c, p, nl - p, t);
        }
        p = nl + 1;
    }
    if (p < e) keep(c, p, e - p);
}

static void read_body(conn *c, const char *p, size_t n, uint64_t t) {
    if (!c->chunked) {
        lines(c, p, n, t);
        if (c->has_length && !(c->left -= n < c->left ? n : c->left)) c->over = 1;
        return;
    }
    while (n) {
        switch (c->chunk) {
        case SIZE:
            if (isxdigit((unsigned char)*p)) c->left = c->left * 16 + (*p <= '9' ? *p - '0' : (*p | 32) - 'a' + 10);
            else if (*p == '\n') c->chunk = c->left ? DATA : END;
            else if (*p == ';') c->chunk = EXTENSION;
            p++, n--;
            break;
        case EXTENSION:
            if (*p == '\n') c->chunk = c->left ? DATA : END;
            p++, n--;
            break;
        case DATA: {
            size_t k = n < c->left ? n : c->left;
            lines(c, p, k, t);
            p += k, n -= k, c->left -= k;
            if (!c->left) c->chunk = CRLF;
            break;
        }
        case CRLF:
            if (*p == '\n') c->chunk = SIZE;
            p++, n--;
            break;
        case END:
            n = 0;
        }
    }
    if (c->chunk == END) c->over = 1;
}

static void start(conn *c) {
    int one = 1;
    c->state = CONNECTING;
    c->last_n = -1;
    c->t_start = now();
    in_flight++;
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) {
        finish(c, 0, strerror(errno));
        return;
    }
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        finish(c, 0, strerror(errno));
        return;
    }
    struct epoll_event event = {.events = EPOLLOUT, .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_ADD, c->fd, &event);
}

static void send_request(conn *c) {
    char request[8192], text[2048];
    int n, i = first + c->index % streams;
    substitute(text, sizeof text, path, i);
    n = snprintf(request, sizeof request, "%s %s HTTP/1.1\r\nHost: %s\r\nAccept: text/event-stream\r\n", method, text,
                 host_port);
    for (int k = 0; k < n_headers; k++) {
        substitute(text, sizeof text, headers[k], i);
        n += snprintf(request + n, sizeof request - n, "%s\r\n", text);
    }
    text[0] = 0;
    if (body) {
        substitute(text, sizeof text, body, i);
        n += snprintf(request + n, sizeof request - n, "Content-Type: application/json\r\nContent-Length: %zu\r\n",
                      strlen(text));
    }
    n += snprintf(request + n, sizeof request - n, "\r\n%s", text);
    if (write(c->fd, request, n) != n) {
        finish(c, 0, "short write of the request");
        return;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    epoll_ctl(ep, EPOLL_CTL_MOD, c->fd, &event);
    c->state = HEADERS;
}

// Whether the head is complete; *n is left with how much of the read's end is body.
static int read_head(conn *c, size_t *n) {
    keep(c, bytes, *n);
    char *end = strstr(c->buf, "\r\n\r\n");
    if (!end) return 0;
    *end = 0;
    c->status = atoi(c->buf + 9);
    c->chunked = strcasestr(c->buf, "transfer-encoding: chunked") != NULL;
    char *length = strcasestr(c->buf, "content-length:");
    if (length) c->has_length = 1, c->left = strtoull(length + 15, NULL, 10);
    *n = c->len - (end + 4 - c->buf);
    c->len = 0;
    if (!sequential) in_flight--;
    c->state = BODY;
    if (c->status == 200) {
        answered++;
    } else {
        char why[32];
        snprintf(why, sizeof why, "status %d", c->status);
        finish(c, 0, why);
    }
    return 1;
}

static void on_readable(conn *c) {
    for (int turn = 0; turn < 4; turn++) {
        ssize_t got = recv(c->fd, bytes, sizeof bytes, 0);
        if (got < 0) {
            if (errno != EAGAIN) finish(c, 0, strerror(errno));
            return;
        }
        if (got == 0) {
            finish(c, 0, "closed early");
            return;
        }
        uint64_t t = now();
        size_t n = got;
        if (c->state == HEADERS && !read_head(c, &n)) continue;
        if (c->state != BODY) return;
        read_body(c, bytes + got - n, n, t);
        if (expect && c->messages >= expect) finish(c, 1, "");
        else if (c->over) finish(c, !expect, "the body ended early");
        if (c->state != BODY || (size_t)got < sizeof bytes) return;
    }
}

static void on_event(conn *c) {
    if (c->state == CONNECTING) {
        int code = 0;
        socklen_t size = sizeof code;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &code, &size);
        if (code) finish(c, 0, strerror(code));
        else send_request(c);
    } else if (c->state == HEADERS || c->state == BODY) {
        on_readable(c);
    }
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// Quantiles over connections of the time from their start to the first event (`done` 0) or to the end (1).
static void print_times(const char *name, int of_done) {
    double *ms = malloc(sizeof *ms * (n_conns + 1));
    int n = 0;
    for (conn *c = conns; c < conns + n_conns; c++) {
        uint64_t t = of_done ? (c->state == DONE ? c->t_done : 0) : c->t_first;
        if (t) ms[n++] = (t - c->t_start) / 1e6;
    }
    qsort(ms, n, sizeof *ms, compare);
    printf("\"%s_p50_ms\":%.3f,\"%s_p99_ms\":%.3f,", name, n ? ms[n / 2] : -1, name, n ? ms[(int)(n * .99)] : -1);
    free(ms);
}

static void print_report(void) {
    uint64_t events = 0, messages = 0, comments = 0;
    uint32_t least = ~0u, least_comments = ~0u;
    struct rusage usage;
    for (conn *c = conns; c < conns + n_conns; c++) {
        events += c->events, messages += c->messages, comments += c->comments;
        if (c->messages < least) least = c->messages;
        if (c->comments < least_comments) least_comments = c->comments;
    }
    getrusage(RUSAGE_SELF, &usage);
    printf("{\"connections\":%d,\"answered\":%d,\"done\":%d,\"failed\":%d,\"error\":\"%s\",", n_conns, answered, done,
           failed, error);
    printf("\"events\":%lu,\"messages\":%lu,\"comments\":%lu,\"least_messages\":%u,\"least_comments\":%u,", events,
           messages, comments, least, least_comments);
    printf("\"gaps\":%lu,\"repeated\":%lu,", gaps, dups);
    printf("\"ready_s\":%.4f,\"last_s\":%.4f,\"span_s\":%.4f,", t_ready ? (t_ready - t_begin) / 1e9 : -1,
           t_last ? (t_last - t_begin) / 1e9 : -1, (t_last - t_first) / 1e9);
    printf("\"p50_ms\":%.3f,\"p99_ms\":%.3f,", latency_ms(.5), latency_ms(.99));
    print_times("first", 0);
    print_times("complete", 1);
    printf("\"cpu_s\":%.3f}\n", usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
                                    (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6);
}

static void parse_options(int argc, char **argv) {
    static struct option options[] = {
        {"url", 1, 0, 'u'},        // http://127.x.x.x:port/path
        {"n", 1, 0, 'n'},          // connections
        {"streams", 1, 0, 's'},    // over this many runs
        {"first", 1, 0, 'f'},      // the number of the first run
        {"expect", 1, 0, 'e'},     // messages until a connection is done
        {"timeout", 1, 0, 't'},    // seconds until all is over
        {"header", 1, 0, 'H'},     // may be repeated
        {"method", 1, 0, 'X'},
        {"body", 1, 0, 'd'},
        {"at-once", 1, 0, 'c'},    // connections that wait for their response's head
        {"sequential", 0, 0, 'q'}, // --at-once counts connections until they are done
        {"per-second", 1, 0, 'R'}, // connections started in a second
        {"ready-file", 1, 0, 'r'}, // made when every connection was answered
        {"first-name", 1, 0, 'N'}, // only an event of this name is a connection's first
        {"hold", 0, 0, 'h'},       // stay until SIGTERM or the timeout
        {0},
    };
    for (int o; (o = getopt_long(argc, argv, "", options, 0)) != -1;) {
        switch (o) {
        case 'u': url = optarg; break;
        case 'n': n_conns = atoi(optarg); break;
        case 's': streams = atoi(optarg); break;
        case 'f': first = atoi(optarg); break;
        case 'e': expect = strtoull(optarg, NULL, 10); break;
        case 't': timeout_s = atof(optarg); break;
        case 'H': headers[n_headers++ & 15] = optarg; break;
        case 'X': method = optarg; break;
        case 'd': body = optarg; break;
        case 'c': at_once = atoi(optarg); break;
        case 'q': sequential = 1; break;
        case 'R': per_second = atof(optarg); break;
        case 'r': ready_file = optarg; break;
        case 'N': first_name = optarg; break;
        case 'h': hold = 1; break;
        default: exit(2);
        }
    }
    char host[64];
    int port, used;
    if (!url || sscanf(url, "http://%63[0-9.]:%d%n", host, &port, &used) < 2 || strncmp(host, "127.", 4)) {
        fprintf(stderr, "--url must be http://127.x.x.x:port/...\n");
        exit(2);
    }
    snprintf(path, sizeof path, "%s", url[used] ? url + used : "/");
    snprintf(host_port, sizeof host_port, "%s:%d", host, port);
    address = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    inet_pton(AF_INET, host, &address.sin_addr);
}

static volatile sig_atomic_t stopped;

static void on_signal(int number) {
    (void)number;
    stopped = 1;
}

int main(int argc, char **argv) {
    parse_options(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    conns = calloc(n_conns, sizeof *conns);
    ep = epoll_create1(0);
    t_begin = now();
    uint64_t end = t_begin + (uint64_t)(timeout_s * 1e9), t;
    struct epoll_event events[512];
    int next = 0;
    while (!stopped && (done + failed < n_conns || hold) && (t = now()) < end) {
        double due = per_second ? (t - t_begin) / 1e9 * per_second + 1 : n_conns;
        while (next < n_conns && in_flight < at_once && next < due) {
            conns[next].index = next;
            start(&conns[next++]);
        }
        if (!t_ready && answered + failed >= n_conns) {
            t_ready = t;
            if (ready_file) close(open(ready_file, O_CREAT | O_WRONLY, 0644));
        }
        int n = epoll_wait(ep, events, 512, per_second ? 1 : 5);
        for (int i = 0; i < n; i++) on_event(events[i].data.ptr);
    }
    print_report();
    return 0;
}
