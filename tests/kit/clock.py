"""A process whose clock a test can set."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

from tests.kit.needs import needs

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

static volatile double *offset;

__attribute__((constructor)) static void begin(void) {
    int file = open(getenv("TEST_CLOCK"), O_RDONLY);
    offset = mmap(0, sizeof(double), PROT_READ, MAP_SHARED, file, 0);
}

int gettimeofday(struct timeval *restrict tv, void *restrict zone) {
    static int (*real)(struct timeval *restrict, void *restrict);
    if (!real) real = dlsym(RTLD_NEXT, "gettimeofday");
    int result = real(tv, zone);
    if (tv && offset && offset != MAP_FAILED) {
        long long micros = tv->tv_sec * 1000000LL + tv->tv_usec + (long long)(*offset * 1e6);
        tv->tv_sec = micros / 1000000;
        tv->tv_usec = micros % 1000000;
    }
    return result;
}
"""


class Clock:
    """Of every process that is started with `prefix`: gettimeofday, which is what Redis asks."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "clock"
        self.set(0)
        source, library = folder / "clock.c", folder / "clock.so"
        source.write_text(_SOURCE)
        subprocess.run([needs("gcc"), "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
        self.prefix = ["env", f"LD_PRELOAD={library}", f"TEST_CLOCK={self._file}"]

    def set(self, seconds: float) -> None:
        """How far it is ahead of the machine's."""
        with self._file.open("rb+" if self._file.exists() else "wb") as file:
            file.write(struct.pack("d", seconds))
