/* A library that answers as NVIDIA's libnvidia-ml.so.1 does, for machines without a GPU.
 *
 * It reads the file named by FAKE_NVML_STATE at each call, so that whoever writes that file is the driver and the
 * hardware (see driver.py, which documents the format). Its own memory is only what a session of the real library keeps:
 * which GPUs were there when it was started, and how often it was started. As in the real one, a GPU that fell off the
 * bus stays lost until the session is ended and another one started, and a restart of the driver ends every session.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, INSUFFICIENT_SIZE = 7,
       DRIVER_NOT_LOADED = 9, GPU_IS_LOST = 15 };
enum { MAX_GPUS = 16, MAX_PROCESSES = 64, TEXT = 96 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Utilization;
typedef struct { unsigned pid; unsigned long long bytes; unsigned gpu_instance, compute_instance; } Process;

typedef struct {
    char uuid[TEXT], name[TEXT];
    unsigned long long total, free;
    int busy, lists, lost; /* busy and lists: -1 and 0 say "not supported"; lost: the code of every answer, or 0 */
    unsigned life;         /* another one since it fell off the bus or came back */
} Gpu;

typedef struct { char uuid[TEXT]; char kind; unsigned pid; unsigned long long bytes; } Listed;

typedef struct {
    char driver[TEXT];
    int init, hang;
    unsigned restarts;
    int gpus, processes;
    Gpu gpu[MAX_GPUS];
    Listed process[MAX_PROCESSES];
} State;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static State now;     /* as the file says, read at the begin of a call */
static State session; /* as it was when the session began */
static unsigned started;

static void load(void) {
    const char *path = getenv("FAKE_NVML_STATE");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[512];
    memset(&now, 0, sizeof now);
    if (!file) {
        now.init = DRIVER_NOT_LOADED;
        return;
    }
    while (fgets(line, sizeof line, file)) {
        Gpu *gpu = &now.gpu[now.gpus];
        Listed *process = &now.process[now.processes];
        if (sscanf(line, "driver %95s", now.driver) == 1 || sscanf(line, "init %d", &now.init) == 1
            || sscanf(line, "hang %d", &now.hang) == 1 || sscanf(line, "restarts %u", &now.restarts) == 1)
            continue;
        if (now.gpus < MAX_GPUS
            && sscanf(line, "gpu %95s %llu %llu %d %d %d %u %95[^\n]", gpu->uuid, &gpu->total, &gpu->free, &gpu->busy,
                      &gpu->lists, &gpu->lost, &gpu->life, gpu->name) == 8)
            now.gpus++;
        else if (now.processes < MAX_PROCESSES
                 && sscanf(line, "process %95s %c %u %llu", process->uuid, &process->kind, &process->pid,
                           &process->bytes) == 4)
            now.processes++;
        else {
            fprintf(stderr, "fake nvml: cannot read: %s", line);
            abort();
        }
    }
    fclose(file);
}

/* Read the state, and wait for as long as it says that calls hang. The caller holds the lock, as in the real library,
 * where one sick GPU stops every thread. */
static void enter(void) {
    const struct timespec pause = {0, 5 * 1000 * 1000};
    pthread_mutex_lock(&lock);
    for (load(); now.hang; load())
        nanosleep(&pause, NULL);
}

static int leave(int code) {
    pthread_mutex_unlock(&lock);
    return code;
}

static int running(void) {
    if (started && now.restarts != session.restarts)
        started = 0;
    return started ? SUCCESS : UNINITIALIZED;
}

/* The GPU behind a handle as it is now, or NULL with the reason in *code. */
static Gpu *find(const Gpu *handle, int *code) {
    if ((*code = running()) != SUCCESS)
        return NULL;
    if (handle < session.gpu || handle >= session.gpu + session.gpus) {
        *code = INVALID_ARGUMENT;
        return NULL;
    }
    for (int i = 0; i < now.gpus; i++) {
        if (strcmp(now.gpu[i].uuid, handle->uuid))
            continue;
        *code = now.gpu[i].life != handle->life ? GPU_IS_LOST : now.gpu[i].lost;
        return *code == SUCCESS ? &now.gpu[i] : NULL;
    }
    *code = GPU_IS_LOST;
    return NULL;
}

static int text(const char *from, char *into, unsigned size) {
    if (strlen(from) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(into, from);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    enter();
    if (now.init != SUCCESS)
        return leave(now.init);
    if (running() != SUCCESS)
        session = now;
    started++;
    return leave(SUCCESS);
}

int nvmlShutdown(void) {
    enter();
    int code = running();
    if (code == SUCCESS)
        started--;
    return leave(code);
}

const char *nvmlErrorString(int code) {
    static char said[32];
    snprintf(said, sizeof said, "fake error %d", code);
    return said;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) {
    enter();
    int code = running();
    return leave(code == SUCCESS ? text(now.driver, version, size) : code);
}

int nvmlDeviceGetCount_v2(unsigned *count) {
    enter();
    int code = running();
    if (code == SUCCESS)
        *count = session.gpus;
    return leave(code);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, Gpu **handle) {
    enter();
    int code = running();
    if (code == SUCCESS && index >= (unsigned)session.gpus)
        code = INVALID_ARGUMENT;
    if (code == SUCCESS && find(&session.gpu[index], &code))
        *handle = &session.gpu[index];
    return leave(code);
}

int nvmlDeviceGetName(Gpu *handle, char *name, unsigned size) {
    int code;
    enter();
    Gpu *gpu = find(handle, &code);
    return leave(gpu ? text(gpu->name, name, size) : code);
}

int nvmlDeviceGetUUID(Gpu *handle, char *uuid, unsigned size) {
    int code;
    enter();
    Gpu *gpu = find(handle, &code);
    return leave(gpu ? text(gpu->uuid, uuid, size) : code);
}

int nvmlDeviceGetMemoryInfo(Gpu *handle, Memory *memory) {
    int code;
    enter();
    Gpu *gpu = find(handle, &code);
    if (gpu && !gpu->total)
        code = NOT_SUPPORTED; /* as where a GPU shares the machine's memory */
    else if (gpu)
        *memory = (Memory){gpu->total, gpu->free, gpu->total - gpu->free};
    return leave(code);
}

int nvmlDeviceGetUtilizationRates(Gpu *handle, Utilization *rates) {
    int code;
    enter();
    Gpu *gpu = find(handle, &code);
    if (gpu && gpu->busy < 0)
        code = NOT_SUPPORTED;
    else if (gpu)
        *rates = (Utilization){gpu->busy, 0};
    return leave(code);
}

/* `count` is the room in `into`, and becomes the number of processes, as in the real library. */
static int list(Gpu *handle, char kind, unsigned *count, Process *into) {
    int code;
    unsigned room = *count, found = 0;
    enter();
    Gpu *gpu = find(handle, &code);
    if (!gpu)
        return leave(code);
    if (!gpu->lists)
        return leave(NOT_SUPPORTED);
    for (int i = 0; i < now.processes; i++) {
        Listed *one = &now.process[i];
        if (one->kind != kind || strcmp(one->uuid, gpu->uuid))
            continue;
        if (into && found < room)
            into[found] = (Process){one->pid, one->bytes, ~0u, ~0u};
        found++;
    }
    *count = found;
    return leave(found > room ? INSUFFICIENT_SIZE : SUCCESS);
}

int nvmlDeviceGetComputeRunningProcesses_v3(Gpu *handle, unsigned *count, Process *into) {
    return list(handle, 'C', count, into);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(Gpu *handle, unsigned *count, Process *into) {
    return list(handle, 'G', count, into);
}
