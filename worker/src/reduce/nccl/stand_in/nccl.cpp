// A stand-in for NCCL, for tests: ranks are threads or processes of one machine, numbers are in the memory
// of the host, and whatever is queued on a "stream" is done by a thread of the communicator. It has the
// functions and types of NCCL's header that looptrain uses, and can be told to fail anywhere.
//
// Ranks meet in a folder, which is their unique id. A stream is the address of a counter of what is queued.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>
#include <sys/stat.h>
#include <unistd.h>

namespace {

enum { Success = 0, InvalidArgument = 4, InProgress = 7 };
enum { Uint32 = 3, Int64 = 4, Float32 = 7, Bfloat16 = 9 };
enum { Sum = 0, Max = 2 };

std::mutex lock;
std::string calls;
std::string last_error;

// What is to go wrong: the `after`-th call of that name by that rank (-1: any) gives `result`; or it is
// stuck until the communicator is aborted (-1; an abort is stuck for ever), or what it queues never ends (-2; an
// abort takes a second).
struct Fault {
    std::string call;
    int rank, after, result;
};
std::vector<Fault> faults;

void rest() { std::this_thread::sleep_for(std::chrono::microseconds(50)); }

}  // namespace

struct Comm {
    std::string folder;
    int rank, world;
    std::atomic<int> state{InProgress};
    std::atomic<bool> stopped{false}, aborted{false};
    uint64_t operations = 0;
    std::mutex mutex;
    std::condition_variable more;
    std::deque<std::function<void()>> queue;
    std::thread thread;
    // What it has queued that is not done, and where that is counted, too.
    std::atomic<uint64_t>* stream = nullptr;
    std::atomic<uint64_t> outstanding{0};

    void done(uint64_t count) {
        outstanding -= count;
        if (stream) *stream -= count;
    }

    std::string file(const std::string& name, int of) const { return folder + "/" + name + "-" + std::to_string(of); }

    // Waits until a file is there; false when the communicator is aborted before. Meanwhile there is nonsense
    // where the sums are to be, as NCCL leaves parts of them there.
    bool await(const std::string& path, char* to = nullptr, size_t bytes = 0) {
        struct stat found;
        while (stat(path.c_str(), &found) != 0) {
            if (stopped) return false;
            scribble(to, bytes);
            rest();
        }
        return true;
    }

    static void scribble(char* to, size_t bytes) {
        if (!to) return;
        for (size_t at = 0; at < bytes; at += 16) to[at] = static_cast<char>(at * 7 + 1);
    }

    void put(const std::string& name, const std::vector<char>& bytes) {
        const std::string to = file(name, rank), part = to + ".part";
        FILE* out = fopen(part.c_str(), "wb");
        // All have left.
        if (!out) return;
        fwrite(bytes.data(), 1, bytes.size(), out);
        fclose(out);
        rename(part.c_str(), to.c_str());
    }

    std::vector<char> get(const std::string& name, int of) {
        FILE* in = fopen(file(name, of).c_str(), "rb");
        fseek(in, 0, SEEK_END);
        std::vector<char> bytes(ftell(in));
        rewind(in);
        if (fread(bytes.data(), 1, bytes.size(), in) != bytes.size()) abort();
        fclose(in);
        return bytes;
    }

    void run() {
        put("joined", {});
        for (int of = 0; of < world; of++)
            if (!await(file("joined", of))) return;
        state = Success;
        for (;;) {
            std::function<void()> next;
            {
                std::unique_lock<std::mutex> held(mutex);
                more.wait(held, [&] { return stopped || !queue.empty(); });
                if (stopped) return;
                next = std::move(queue.front());
                queue.pop_front();
            }
            next();
        }
    }

    // The bytes of all ranks, once all have given as many; none when that never happens.
    std::vector<std::vector<char>> exchange(const void* from, void* to, size_t bytes) {
        const std::string name = std::to_string(operations++);
        const char* begin = static_cast<const char*>(from);
        put(name, std::vector<char>(begin, begin + bytes));
        std::vector<std::vector<char>> all;
        for (int of = 0; of < world; of++) {
            if (!await(file(name, of), static_cast<char*>(to), bytes)) return {};
            all.push_back(get(name, of));
            // NCCL waits for ever for what the other rank does not send.
            while (all.back().size() != bytes) {
                if (stopped) return {};
                rest();
            }
        }
        // All have read what this rank gave before they gave this.
        if (operations > 1) unlink(file(std::to_string(operations - 2), rank).c_str());
        return all;
    }
};

namespace {

// Notes a call; the result that it is to have, if there is one.
int noted(const char* call, Comm* comm, int rank) {
    std::unique_lock<std::mutex> held(lock);
    calls += std::to_string(rank) + " " + call + "\n";
    for (Fault& fault : faults) {
        if (fault.call != call || (fault.rank != -1 && fault.rank != rank)) continue;
        if (fault.after-- != 1) continue;
        if (fault.result == -1) {
            held.unlock();
            while (!comm || !comm->stopped) rest();
            return InvalidArgument;
        }
        last_error = "told to fail";
        return fault.result;
    }
    return Success;
}

template <typename T>
void combine(std::vector<std::vector<char>>& all, void* to, size_t count, int operation) {
    T* out = static_cast<T*>(to);
    for (size_t i = 0; i < count; i++) {
        T value = reinterpret_cast<T*>(all[0].data())[i];
        for (size_t of = 1; of < all.size(); of++) {
            const T next = reinterpret_cast<T*>(all[of].data())[i];
            value = operation == Max ? (next > value ? next : value) : value + next;
        }
        out[i] = value;
    }
}

int enqueue(Comm* comm, void* stream, int told, std::function<void()> work) {
    if (told != Success && told != -2) return told;
    comm->stream = static_cast<std::atomic<uint64_t>*>(stream);
    comm->outstanding++;
    if (comm->stream) (*comm->stream)++;
    {
        std::unique_lock<std::mutex> held(comm->mutex);
        comm->queue.push_back([=] {
            if (told == -2)
                while (!comm->stopped) rest();
            else
                work();
            if (!comm->stopped) comm->done(1);
        });
    }
    comm->more.notify_one();
    return Success;
}

size_t width(int type) { return type == Int64 ? 8 : type == Bfloat16 ? 2 : 4; }

// A bf16, whose sums are rounded to the nearest, of two the even one.
struct Half {
    uint16_t bits;

    operator float() const {
        const uint32_t wide = uint32_t(bits) << 16;
        float value;
        memcpy(&value, &wide, sizeof value);
        return value;
    }

    Half operator+(Half other) const {
        const float sum = float(*this) + float(other);
        uint32_t wide;
        memcpy(&wide, &sum, sizeof wide);
        return {uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16)};
    }
};

}  // namespace

extern "C" {

struct UniqueId {
    char internal[128];
};

struct Config {
    size_t size;
    unsigned magic, version;
    int blocking;
};

int ncclGetVersion(int* version) {
    const char* told = getenv("LOOPTRAIN_STAND_IN_NCCL_VERSION");
    *version = told ? atoi(told) : 23203;
    return Success;
}

int ncclGetUniqueId(UniqueId* id) {
    if (int result = noted("ncclGetUniqueId", nullptr, -1)) return result;
    const char* folder = getenv("TMPDIR");
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "%s/looptrain-nccl-XXXXXX", folder ? folder : "/tmp");
    return mkdtemp(id->internal) ? Success : InvalidArgument;
}

int ncclCommInitRankConfig(Comm** to, int ranks, UniqueId id, int rank, Config* config) {
    if (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->blocking != 0 || config->version < 22602) {
        last_error = "not the configuration of a communicator that blocks in no call";
        return InvalidArgument;
    }
    if (rank < 0 || rank >= ranks) return InvalidArgument;
    Comm* comm = new Comm;
    comm->folder = id.internal;
    comm->rank = rank;
    comm->world = ranks;
    *to = comm;
    const int result = noted("ncclCommInitRankConfig", comm, rank);
    if (result != Success) {
        if (result > 0) {
            *to = nullptr;
            delete comm;
        }
        return result == -2 ? InProgress : result;
    }
    comm->thread = std::thread([=] { comm->run(); });
    return InProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
    *state = comm->state;
    // What has gone wrong in the background.
    std::unique_lock<std::mutex> held(lock);
    for (Fault& fault : faults) {
        if (fault.call == "background" && (fault.rank == -1 || fault.rank == comm->rank) && fault.after-- == 1) {
            last_error = "told to fail in the background";
            comm->state = *state = fault.result;
        }
    }
    return Success;
}

const char* ncclGetLastError(Comm*) {
    std::unique_lock<std::mutex> held(lock);
    return last_error.c_str();
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Comm* comm, void* stream) {
    if (comm->state == InProgress) return InvalidArgument;
    const int told = noted("ncclAllReduce", comm, comm->rank);
    return enqueue(comm, stream, told, [=] {
        auto all = comm->exchange(from, to, count * width(type));
        if (all.empty()) return;
        if (type == Int64) combine<int64_t>(all, to, count, operation);
        if (type == Float32) combine<float>(all, to, count, operation);
        if (type == Bfloat16) combine<Half>(all, to, count, operation);
        if (type == Uint32) combine<uint32_t>(all, to, count, operation);
    });
}

int ncclAllGather(const void* from, void* to, size_t count, int type, Comm* comm, void* stream) {
    const int told = noted("ncclAllGather", comm, comm->rank);
    return enqueue(comm, stream, told, [=] {
        auto all = comm->exchange(from, nullptr, count * width(type));
        for (size_t of = 0; of < all.size(); of++) memcpy(static_cast<char*>(to) + of * all[of].size(), all[of].data(), all[of].size());
    });
}

int ncclCommAbort(Comm* comm) {
    if (comm->aborted.exchange(true)) {
        fprintf(stderr, "a communicator was aborted twice\n");
        abort();
    }
    const int result = noted("ncclCommAbort", nullptr, comm->rank);
    if (result == -2) std::this_thread::sleep_for(std::chrono::seconds(1));
    comm->stopped = true;
    comm->more.notify_all();
    if (comm->thread.joinable()) comm->thread.join();
    comm->done(comm->outstanding);
    // What it has given stays until all have left: they may be about to read it.
    comm->put("left", {});
    bool all = true;
    struct stat found;
    for (int of = 0; of < comm->world; of++) all = all && stat(comm->file("left", of).c_str(), &found) == 0;
    std::error_code gone;
    if (all) std::filesystem::remove_all(comm->folder, gone);
    // It is not given back: a second abort is to be seen.
    return result == -2 ? Success : result;
}

// ---- for tests -------------------------------------------------------------------------------

void stand_in_fail(const char* call, int rank, int after, int result) {
    std::unique_lock<std::mutex> held(lock);
    faults.push_back({call, rank, after, result});
}

// What was called since the last time, a line each.
size_t stand_in_calls(char* to, size_t room) {
    std::unique_lock<std::mutex> held(lock);
    const size_t length = calls.size() < room ? calls.size() : room;
    memcpy(to, calls.data(), length);
    calls.clear();
    return length;
}

void stand_in_forget() {
    std::unique_lock<std::mutex> held(lock);
    faults.clear();
}

}  // extern "C"
