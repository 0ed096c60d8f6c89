/* Preloaded into a process: counts the calls that change files below a folder, and lets one of them fail.

   pyarrow, safetensors, torch and matplotlib write in native code, so nothing in Python can stand in for a full disk.
   Counted are opening for writing, writing, truncating, renaming, linking, making and removing names, and fsync. A call
   of the C library to itself (fwrite to write) does not pass here, so the functions of stdio are counted themselves. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ONCE = 0, FROM_THERE_ON = 1, KILL = 2 };

#define MOST 100000

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char folder[PATH_MAX];
static long fail_at;      /* the number of the call that fails, from 1; 0: none */
static int kind, error_number;
static long calls;
static char letters[MOST + 1]; /* what each call was, a letter each */
static char failed[PATH_MAX + 64];

/* `folder` is watched from now on; "" ends it. The count starts again. */
void faults_begin(const char *watched, long number, int how, int error) {
    pthread_mutex_lock(&lock);
    snprintf(folder, sizeof folder, "%s", watched);
    fail_at = number, kind = how, error_number = error, calls = 0, failed[0] = 0;
    memset(letters, 0, sizeof letters);
    pthread_mutex_unlock(&lock);
}

const char *faults_calls(void) { return letters; }
const char *faults_failed(void) { return failed; }

static int below(const char *path) {
    size_t n = strlen(folder);
    return n && !strncmp(path, folder, n) && (path[n] == '/' || path[n] == 0);
}

static int watched_path(int at, const char *path, char *whole) {
    char base[PATH_MAX], link[64];
    if (!folder[0] || !path) return 0;
    if (path[0] == '/') {
        snprintf(whole, PATH_MAX, "%s", path);
    } else {
        ssize_t n;
        if (at == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        if ((n = readlink(link, base, sizeof base - 1)) < 0) return 0;
        base[n] = 0;
        snprintf(whole, PATH_MAX, "%.2000s/%.2000s", base, path);
    }
    return below(whole);
}

static int watched_file(int fd, char *whole) {
    char link[64];
    ssize_t n;
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if ((n = readlink(link, whole, PATH_MAX - 1)) < 0) return 0;
    whole[n] = 0;
    return below(whole);
}

/* Whether this call is to fail (errno is set then). No disk is too full to remove a name. */
static int fails(char letter, const char *path) {
    int yes = 0;
    pthread_mutex_lock(&lock);
    if (calls < MOST) letters[calls] = letter;
    calls++;
    if (fail_at && (calls == fail_at || (kind == FROM_THERE_ON && calls > fail_at)))
        yes = !(error_number == ENOSPC && letter == 'u');
    if (yes && !failed[0]) snprintf(failed, sizeof failed, "%c %s", letter, path);
    pthread_mutex_unlock(&lock);
    if (yes && kind == KILL) kill(getpid(), SIGKILL);
    if (yes) errno = error_number;
    return yes;
}

#define REAL(result, name, ...) \
    static result (*real)(__VA_ARGS__); \
    if (!real) real = (result (*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

#define BY_PATH(letter, at, path, failure) \
    do { char whole[PATH_MAX]; int before = errno; \
         if (watched_path(at, path, whole)) { errno = before; if (fails(letter, whole)) return failure; } \
         errno = before; } while (0)
#define BY_FILE(letter, fd, failure) \
    do { char whole[PATH_MAX]; int before = errno; \
         if (watched_file(fd, whole)) { errno = before; if (fails(letter, whole)) return failure; } \
         errno = before; } while (0)

#define MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, mode_t); va_end(a); }
#define WRITES(flags) (((flags) & O_ACCMODE) != O_RDONLY)

int open(const char *path, int flags, ...) {
    REAL(int, open, const char *, int, ...); MODE(flags)
    if (WRITES(flags)) BY_PATH('o', AT_FDCWD, path, -1);
    return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    REAL(int, open64, const char *, int, ...); MODE(flags)
    if (WRITES(flags)) BY_PATH('o', AT_FDCWD, path, -1);
    return real(path, flags, mode);
}
int openat(int at, const char *path, int flags, ...) {
    REAL(int, openat, int, const char *, int, ...); MODE(flags)
    if (WRITES(flags)) BY_PATH('o', at, path, -1);
    return real(at, path, flags, mode);
}
int openat64(int at, const char *path, int flags, ...) {
    REAL(int, openat64, int, const char *, int, ...); MODE(flags)
    if (WRITES(flags)) BY_PATH('o', at, path, -1);
    return real(at, path, flags, mode);
}
int creat(const char *path, mode_t mode) {
    REAL(int, creat, const char *, mode_t); BY_PATH('o', AT_FDCWD, path, -1); return real(path, mode);
}
FILE *fopen(const char *path, const char *how) {
    REAL(FILE *, fopen, const char *, const char *);
    if (strpbrk(how, "wa+")) BY_PATH('o', AT_FDCWD, path, NULL);
    return real(path, how);
}
FILE *fopen64(const char *path, const char *how) {
    REAL(FILE *, fopen64, const char *, const char *);
    if (strpbrk(how, "wa+")) BY_PATH('o', AT_FDCWD, path, NULL);
    return real(path, how);
}

ssize_t write(int fd, const void *from, size_t n) {
    REAL(ssize_t, write, int, const void *, size_t); BY_FILE('w', fd, -1); return real(fd, from, n);
}
ssize_t pwrite(int fd, const void *from, size_t n, off_t to) {
    REAL(ssize_t, pwrite, int, const void *, size_t, off_t); BY_FILE('w', fd, -1); return real(fd, from, n, to);
}
ssize_t pwrite64(int fd, const void *from, size_t n, off64_t to) {
    REAL(ssize_t, pwrite64, int, const void *, size_t, off64_t); BY_FILE('w', fd, -1); return real(fd, from, n, to);
}
ssize_t writev(int fd, const struct iovec *from, int n) {
    REAL(ssize_t, writev, int, const struct iovec *, int); BY_FILE('w', fd, -1); return real(fd, from, n);
}
size_t fwrite(const void *from, size_t size, size_t n, FILE *file) {
    REAL(size_t, fwrite, const void *, size_t, size_t, FILE *); BY_FILE('w', fileno(file), 0);
    return real(from, size, n, file);
}
int fflush(FILE *file) {
    REAL(int, fflush, FILE *); if (file) BY_FILE('w', fileno(file), EOF); return real(file);
}
ssize_t sendfile(int to, int from, off_t *at, size_t n) {
    REAL(ssize_t, sendfile, int, int, off_t *, size_t); BY_FILE('w', to, -1); return real(to, from, at, n);
}
ssize_t sendfile64(int to, int from, off64_t *at, size_t n) {
    REAL(ssize_t, sendfile64, int, int, off64_t *, size_t); BY_FILE('w', to, -1); return real(to, from, at, n);
}
ssize_t copy_file_range(int from, off64_t *at, int to, off64_t *target, size_t n, unsigned flags) {
    REAL(ssize_t, copy_file_range, int, off64_t *, int, off64_t *, size_t, unsigned); BY_FILE('w', to, -1);
    return real(from, at, to, target, n, flags);
}
int ftruncate(int fd, off_t size) { REAL(int, ftruncate, int, off_t); BY_FILE('w', fd, -1); return real(fd, size); }
int ftruncate64(int fd, off64_t size) {
    REAL(int, ftruncate64, int, off64_t); BY_FILE('w', fd, -1); return real(fd, size);
}
int posix_fallocate(int fd, off_t at, off_t n) {
    REAL(int, posix_fallocate, int, off_t, off_t); BY_FILE('w', fd, errno); return real(fd, at, n);
}
int fsync(int fd) { REAL(int, fsync, int); BY_FILE('s', fd, -1); return real(fd); }
int fdatasync(int fd) { REAL(int, fdatasync, int); BY_FILE('s', fd, -1); return real(fd); }

int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *); BY_PATH('r', AT_FDCWD, to, -1); return real(from, to);
}
int renameat(int at, const char *from, int there, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *); BY_PATH('r', there, to, -1);
    return real(at, from, there, to);
}
int renameat2(int at, const char *from, int there, const char *to, unsigned flags) {
    REAL(int, renameat2, int, const char *, int, const char *, unsigned); BY_PATH('r', there, to, -1);
    return real(at, from, there, to, flags);
}
int link(const char *from, const char *to) {
    REAL(int, link, const char *, const char *); BY_PATH('l', AT_FDCWD, to, -1); return real(from, to);
}
int linkat(int at, const char *from, int there, const char *to, int flags) {
    REAL(int, linkat, int, const char *, int, const char *, int); BY_PATH('l', there, to, -1);
    return real(at, from, there, to, flags);
}
int symlink(const char *from, const char *to) {
    REAL(int, symlink, const char *, const char *); BY_PATH('l', AT_FDCWD, to, -1); return real(from, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t); BY_PATH('m', AT_FDCWD, path, -1); return real(path, mode);
}
int mkdirat(int at, const char *path, mode_t mode) {
    REAL(int, mkdirat, int, const char *, mode_t); BY_PATH('m', at, path, -1); return real(at, path, mode);
}
int chmod(const char *path, mode_t mode) {
    REAL(int, chmod, const char *, mode_t); BY_PATH('c', AT_FDCWD, path, -1); return real(path, mode);
}
int fchmod(int fd, mode_t mode) { REAL(int, fchmod, int, mode_t); BY_FILE('c', fd, -1); return real(fd, mode); }
int fchmodat(int at, const char *path, mode_t mode, int flags) {
    REAL(int, fchmodat, int, const char *, mode_t, int); BY_PATH('c', at, path, -1);
    return real(at, path, mode, flags);
}
int unlink(const char *path) { REAL(int, unlink, const char *); BY_PATH('u', AT_FDCWD, path, -1); return real(path); }
int unlinkat(int at, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int); BY_PATH('u', at, path, -1); return real(at, path, flags);
}
int remove(const char *path) { REAL(int, remove, const char *); BY_PATH('u', AT_FDCWD, path, -1); return real(path); }
int rmdir(const char *path) { REAL(int, rmdir, const char *); BY_PATH('u', AT_FDCWD, path, -1); return real(path); }
