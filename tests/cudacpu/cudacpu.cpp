// The emulator's runtime: fibers, barriers, warp operations, launches, and the memory checks.
#include "cudacpu.h"
#include <csetjmp>
#include <csignal>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cpu {
enum State : char { READY, AT_BLOCK, AT_WARP, DONE };
struct Fiber {
    void* sp;
    State state;
    int line, site, source;            // where it waits; site tells barriers on one line apart
    unsigned mask, size;
    const void* in;
    void* out;
    uint3 tid;
};
constexpr int MAX_THREADS = 1024, MAX_WARPS = 32;
static Fiber fibers[MAX_THREADS];
static int nthreads, ndone, nwaiting, current;
static int warp_syncs[MAX_WARPS];                                // memory-ordering barriers that each warp has passed
static unsigned waiting[MAX_WARPS], exited[MAX_WARPS];           // lanes of each warp at a warp operation; lanes that are gone
static void* scheduler_sp;
static char* stacks;
static char* shared_memory;
static void (*kernel)(void**);
static void** kernel_args;
static sigjmp_buf escape;
static char message[512];
static uint32_t epoch, block_start, block_id;                    // epoch: intervals between barriers, unique in a launch
static char* code_base;                                          // where the kernel's library is loaded
constexpr size_t STACK = 64 << 10, PAGE = 4096, GUARD = 64 << 20;

int lane() { return current & 31; }
void* dynamic_shared() { return shared_memory; }
static void where(char* out, size_t n)
{
    const uint3 t = fibers[current].tid;
    snprintf(out, n, "block (%u,%u,%u) thread (%u,%u,%u)", blockIdx.x, blockIdx.y, blockIdx.z, t.x, t.y, t.z);
}
[[noreturn]] static void fail(const char* what, int line)
{
    char place[128];
    where(place, sizeof place);
    snprintf(message, sizeof message, "%s at line %d, %s", what, line, place);
    siglongjmp(escape, 1);
}
[[noreturn]] static void fail_at(const char* what, const void* pc, uintptr_t value)     // Python turns pc into a line
{
    char place[128];
    where(place, sizeof place);
    snprintf(message, sizeof message, "%s pc=%#lx value=%#lx %s", what, long((char*)pc - code_base), long(value), place);
    siglongjmp(escape, 1);
}

// ---- fibers -------------------------------------------------------------------------------------
extern "C" void cpu_switch(void** save, void* load);
asm(R"(
.text
.hidden cpu_switch
.globl cpu_switch
cpu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
static void yield() { cpu_switch(&fibers[current].sp, scheduler_sp); }
static void release_block()
{
    if (!nwaiting || nwaiting + ndone < nthreads) return;
    const Fiber* first = nullptr;
    for (int t = 0; t < nthreads; ++t) {
        Fiber& f = fibers[t];
        if (f.state != AT_BLOCK) continue;
        if (!first) first = &f;
        if (f.line != first->line || f.site != first->site) {
            current = t;
            fail("divergent __syncthreads", f.line);
        }
        f.state = READY;
    }
    nwaiting = 0;
    ++epoch;
}
static void release_warp(unsigned mask)                          // of the current warp, if all of `mask` is there or gone
{
    const int w = current >> 5;
    const unsigned here = mask & waiting[w];
    if (!here || (here | (mask & exited[w])) != mask) return;
    Fiber* warp = fibers + w * 32;
    const Fiber& first = warp[__builtin_ctz(here)];
    for (unsigned m = here; m; m &= m - 1) {
        const Fiber& f = warp[__builtin_ctz(m)];
        if (f.mask != mask) return;
        if (f.size != first.size || std::min(f.source, 0) != std::min(first.source, 0) ||
            (f.source != SYNC && f.line != first.line)) {
            current = int(&f - fibers);
            fail("divergent warp operation", f.line);
        }
    }
    for (unsigned m = here; m; m &= m - 1) {
        Fiber& f = warp[__builtin_ctz(m)];
        if (f.source >= 0) {
            if (!(here >> f.source & 1)) {
                current = int(&f - fibers);
                fail("shuffle from a lane that is not in the mask or has exited", f.line);
            }
            std::memcpy(f.out, warp[f.source].in, f.size);
        } else if (f.source == GATHER) {
            std::memset(f.out, 0, 32 * f.size);
            for (unsigned k = here; k; k &= k - 1)
                std::memcpy((char*)f.out + __builtin_ctz(k) * f.size, warp[__builtin_ctz(k)].in, f.size);
        }
        f.state = READY;
    }
    waiting[w] &= ~here;
    warp_syncs[w] += mask == ~0u && first.source == SYNC;
}
void block_sync(int line, int site)
{
    Fiber& f = fibers[current];
    f.state = AT_BLOCK;
    f.line = line;
    f.site = site;
    ++nwaiting;
    release_block();
    if (f.state != READY) yield();
}
void warp_exchange(unsigned mask, const void* in, unsigned size, void* out, int source, int line)
{
    Fiber& f = fibers[current];
    if (!(mask >> lane() & 1)) fail("calling lane is not in its own mask", line);
    f.in = in;
    f.out = out;
    f.size = size;
    f.source = source;
    f.mask = mask;
    f.line = line;
    f.state = AT_WARP;
    waiting[current >> 5] |= 1u << lane();
    release_warp(mask);
    if (f.state != READY) yield();
}
static std::vector<Copy> copies[MAX_THREADS];                    // cp.async in flight, by thread
static int groups[MAX_THREADS];
bool eager_copies;
void push_copy(Copy c)
{
    c.group = groups[current];
    copies[current].push_back(c);
}
void commit_copies() { ++groups[current]; }
bool pop_copy(size_t prior, Copy& c)
{
    auto& queue = copies[current];
    if (queue.empty() || queue.front().group >= groups[current] - int(prior)) return false;
    c = queue.front();
    queue.erase(queue.begin());
    return true;
}
static void fiber_main()
{
    kernel(kernel_args);
    fibers[current].state = DONE;
    ++ndone;
    exited[current >> 5] |= 1u << lane();
    release_block();
    for (unsigned m = waiting[current >> 5]; m;) {               // this exit may complete any of the groups that wait
        const unsigned mask = fibers[(current & ~31) + __builtin_ctz(m)].mask;
        m &= ~mask;
        release_warp(mask);
    }
    yield();
    __builtin_trap();
}

// ---- scheduler ----------------------------------------------------------------------------------
static uint64_t rng;
static uint32_t random_below(uint32_t n)
{
    rng = rng * 6364136223846793005u + 1442695040888963407u;
    return uint32_t((rng >> 33) * n >> 31);
}
static void permute(int* a, int n, uint64_t seed)                // seed 0: in order, 1: reversed, else shuffled
{
    for (int i = 0; i < n; ++i) a[i] = seed == 1 ? n - 1 - i : i;
    for (int i = n - 1; seed > 1 && i > 0; --i) std::swap(a[i], a[random_below(i + 1)]);
}
static void start_fibers()
{
    for (int t = 0; t < nthreads; ++t) {
        Fiber& f = fibers[t];
        void** top = (void**)(stacks + (t + 1) * STACK - (t & 63) * 320);     // staggered: else all stacks share cache sets
        top[-1] = nullptr;
        top[-2] = (void*)fiber_main;
        for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
        f.sp = top - 8;
        f.state = READY;
        f.tid = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        copies[t].clear();
        groups[t] = 0;
    }
    ndone = nwaiting = 0;
    for (int first = 0; first < nthreads; first += 32) {
        const int w = first / 32, live = nthreads - first;
        warp_syncs[w] = 0;
        waiting[w] = 0;
        exited[w] = live >= 32 ? 0 : ~0u << live;
    }
}
static bool run_warp(int w, uint64_t seed)                       // ahead until all its lanes are blocked
{
    int lanes[32];
    bool progress = false;
    for (bool ran = true; ran;) {
        ran = false;
        permute(lanes, 32, seed);
        for (int l : lanes) {
            const int t = w * 32 + l;
            if (t >= nthreads || fibers[t].state != READY) continue;
            current = t;
            threadIdx = fibers[t].tid;
            cpu_switch(&scheduler_sp, fibers[t].sp);
            ran = progress = true;
        }
    }
    return progress;
}
static void run_block(uint64_t seed)
{
    start_fibers();
    const int nwarps = (nthreads + 31) / 32;
    int warps[MAX_WARPS];
    while (ndone < nthreads) {
        bool progress = false;
        permute(warps, nwarps, seed);
        for (int w = 0; w < nwarps; ++w) progress |= run_warp(warps[w], seed);
        if (progress) continue;
        for (current = 0; fibers[current].state == DONE; ++current) {}
        fail("deadlock: threads wait at different barriers", fibers[current].line);
    }
}

// ---- memory: guard pages, poison, access checks ---------------------------------------------------
enum Access { READ, WRITE, ATOMIC };
enum Kind { WRITE_WRITE = 1, READ_AFTER_WRITE, WRITE_AFTER_READ, UNINITIALIZED, OUTSIDE };
// The last writer and reader(s).
struct Cell { uint32_t wthread, wepoch, wsync, wpc, rthread, repoch, rsync, rpc, rblock, atomic; };
struct Range { char *lo, *hi, *first, *last; int shift; bool shared; Cell* cells; };           // [lo, hi) in pages [first, last)
struct Report { int kind, range; int64_t offset; uint32_t block, thread, other_thread, other_block, pc, other_pc; };
static Range ranges[64];
static Report reports[64];
static int nranges, nreports;
static char* fenced;                                           // blocks that ran __threadfence(): others may read what they wrote
static uint32_t nblocks;
constexpr uint32_t MULTI = 0x80000000u, MANY = ~0u;              // several readers: MULTI | warp, or of several warps: MANY
void fence() { fenced[block_id] = 1; }

static void note(int kind, const Range& r, int64_t offset, uint32_t pc, uint32_t other = MANY, uint32_t other_pc = 0)
{
    for (int i = 0; i < nreports; ++i)
        if (reports[i].pc == pc && reports[i].other_pc == other_pc && reports[i].kind == kind) return;
    if (nreports == 64) return;
    const uint32_t thread = other == MANY ? MANY : other % nthreads, block = other == MANY ? MANY : other / nthreads;
    reports[nreports++] = {kind, int(&r - ranges), offset, block_id, uint32_t(current), thread, block, pc, other_pc};
}
static void access(void* p, size_t size, Access how, void* ret)
{
    const bool write = how != READ;
    char* a = (char*)p;
    static int latest = 0;
    auto in = [&](int i) { return i < nranges && a >= ranges[i].first && a < ranges[i].last; };
    if (!in(latest)) {
        for (latest = 0; latest < nranges && !in(latest); ++latest) {}
        if (latest == nranges) return;                           // stack, code, runtime
    }
    Range& r = ranges[latest];
    const uint32_t pc = uint32_t((char*)ret - code_base), me = block_id * nthreads + current;
    const uint32_t mywarp = current >> 5, mysync = warp_syncs[mywarp];
    if (a < r.lo || a + size > r.hi) return note(OUTSIDE, r, a - r.lo, pc);
    auto warp_of = [](uint32_t thread) { return uint32_t(thread % nthreads) >> 5; };
    for (size_t i = size_t(a - r.lo) >> r.shift; i <= size_t(a - r.lo + size - 1) >> r.shift; ++i) {
        Cell& c = r.cells[i];
        const int64_t offset = int64_t(i) << r.shift;
        const bool written = c.wepoch && (!r.shared || c.wepoch >= block_start);
        if (written && c.wthread != me && !(how == ATOMIC && c.atomic)) {
            const uint32_t writer = c.wthread / nthreads;
            const bool now = c.wepoch == epoch, ordered = warp_of(c.wthread) == mywarp && c.wsync < mysync;
            if (now ? !ordered : !r.shared && writer != block_id && !fenced[writer])
                note(write ? WRITE_WRITE : READ_AFTER_WRITE, r, offset, pc, c.wthread, c.wpc);
        }
        if (how != WRITE && r.shared && !written) note(UNINITIALIZED, r, offset, pc);
        if (write) {
            if (c.repoch == epoch && c.rthread != me) {
                const bool multi = c.rthread & MULTI, same = multi ? c.rthread == (MULTI | mywarp) : warp_of(c.rthread) == mywarp;
                if (!(same && c.rsync < mysync)) note(WRITE_AFTER_READ, r, offset, pc, multi ? MANY : c.rthread, c.rpc);
            } else if (!r.shared && c.repoch && c.rblock != block_id + 1) {
                note(WRITE_AFTER_READ, r, offset, pc, c.rthread & MULTI ? MANY : c.rthread, c.rpc);
            }
            c.atomic = how == ATOMIC && (c.atomic || c.wepoch != epoch);      // nothing but atomics since the barrier
            c.wthread = me;
            c.wepoch = epoch;
            c.wsync = mysync;
            c.wpc = pc;
        } else {
            if (c.repoch == epoch && c.rthread != me) {
                const uint32_t warp = c.rthread & MULTI ? c.rthread & ~MULTI : warp_of(c.rthread);
                c.rthread = c.rthread != MANY && warp == mywarp ? MULTI | mywarp : MANY;
            } else {
                c.rthread = me;
            }
            c.rblock = !c.repoch || c.rblock == block_id + 1 ? block_id + 1 : MANY;
            c.repoch = epoch;
            c.rsync = mysync;
            c.rpc = pc;
        }
    }
}
void atomic_access(void* p, size_t size, void* pc) { access(p, size, ATOMIC, pc); }
extern "C" {                            // what -fsanitize=thread, bounds and alignment call: ours, no sanitizer library is linked
#define HOOK(n) void __tsan_read##n(void* p) { access(p, n, READ, __builtin_return_address(0)); } \
                void __tsan_write##n(void* p) { access(p, n, WRITE, __builtin_return_address(0)); } \
                void __tsan_unaligned_read##n(void* p) { access(p, n, READ, __builtin_return_address(0)); } \
                void __tsan_unaligned_write##n(void* p) { access(p, n, WRITE, __builtin_return_address(0)); }
HOOK(1) HOOK(2) HOOK(4) HOOK(8) HOOK(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, READ, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { access(p, n, WRITE, __builtin_return_address(0)); }
void __tsan_init() {}
void __ubsan_handle_out_of_bounds(void*, uintptr_t index) { fail_at("INDEX", __builtin_return_address(0), index); }
void __ubsan_handle_type_mismatch_v1(void*, uintptr_t address) { fail_at("MISALIGNED", __builtin_return_address(0), address); }

// A buffer of n bytes that ends, up to the next multiple of 16, at an inaccessible zone; its address is `phase` modulo 16.
static size_t padded(size_t n, size_t phase) { return n + (-(n + phase) & 15); }
static size_t pages(size_t n) { return (n + PAGE - 1) / PAGE * PAGE; }
void* cpu_alloc(size_t n, size_t phase)
{
    const size_t used = padded(n, phase), body = pages(used);
    char* m = (char*)mmap(nullptr, body + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return nullptr;
    m += GUARD;
    mprotect(m, body, PROT_READ | PROT_WRITE);
    std::memset(m, 0xFF, body);
    return m + body - used;
}
static char* last_byte(char* p, size_t n) { return p + padded(n, uintptr_t(p) & 15); }
static char* first_byte(char* p, size_t n) { return last_byte(p, n) - pages(padded(n, uintptr_t(p) & 15)); }
void cpu_free(char* p, size_t n) { munmap(first_byte(p, n) - GUARD, last_byte(p, n) - first_byte(p, n) + 2 * GUARD); }
int cpu_intact(char* p, size_t n)       // nothing was written beside the buffer, in the pages that hold it
{
    auto poisoned = [](char* a, char* b) { return std::all_of(a, b, [](char c) { return c == char(0xFF); }); };
    return poisoned(first_byte(p, n), p) && poisoned(p + n, last_byte(p, n));
}
}
static void on_signal(int number, siginfo_t* info, void* context)
{
    const void* pc = (void*)((ucontext_t*)context)->uc_mcontext.gregs[REG_RIP];
    fail_at(number == SIGFPE ? "DIVISION" : "ADDRESS", (const char*)pc + 1, uintptr_t(info->si_addr));
}
static char* tls;
static size_t tls_size;
static int find_module(dl_phdr_info* info, size_t, void* function)     // the kernel's library: its TLS and load address
{
    bool mine = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
        const auto& header = info->dlpi_phdr[i];
        const char* at = (char*)info->dlpi_addr + header.p_vaddr;
        mine |= header.p_type == PT_LOAD && function >= at && function < at + header.p_memsz;
    }
    if (!mine) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i)
        if (info->dlpi_phdr[i].p_type == PT_TLS) {
            tls = (char*)info->dlpi_tls_data;
            tls_size = info->dlpi_phdr[i].p_memsz;
        }
    code_base = (char*)info->dlpi_addr;
    return 1;
}
static void watch(char* first, char* lo, size_t n, char* last, int shift, bool shared)
{
    if (n) ranges[nranges++] = {lo, lo + n, first, last, shift, shared, (Cell*)calloc((n >> shift) + 1, sizeof(Cell))};
}
static void run_grid(uint64_t seed)
{
    const int poison = seed % 2 ? 0x7E : 0xFF;                   // 8e37, or NaN, which fmax() would ignore
    for (uint32_t i = 0; i < nblocks; ++i) {
        block_id = seed == 1 ? nblocks - 1 - i : seed > 1 ? uint32_t((i + seed % nblocks) % nblocks) : i;
        blockIdx = {block_id % gridDim.x, block_id / gridDim.x % gridDim.y, block_id / (gridDim.x * gridDim.y)};
        std::memset(tls, poison, tls_size);
        std::memset(ranges[0].lo, poison, ranges[0].hi - ranges[0].lo);
        block_start = ++epoch;
        run_block(seed);
    }
}
}
using namespace cpu;
extern "C"  // nbuf buffers: address, bytes, log2 of the element size. Returns 0, or 1 with a message
int cpu_launch(void (*k)(void**), void** args, const unsigned* grid, const unsigned* block, size_t shared, uint64_t seed,
               char** buffers, const size_t* sizes, const int* shifts, int nbuf, int check)
{
    if (!stacks) {
        stacks = (char*)mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        for (int i = 0; i < MAX_THREADS; ++i) mprotect(stacks + i * STACK, PAGE, PROT_NONE);
    }
    k(nullptr);
    tls_size = 0;
    dl_iterate_phdr(find_module, (void*)k);
    kernel = k;
    kernel_args = args;
    rng = seed * 0x9E3779B97F4A7C15u + 1;
    message[0] = 0;
    nreports = 0;
    epoch = 0;
    eager_copies = seed % 2;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    nthreads = block[0] * block[1] * block[2];
    nblocks = grid[0] * grid[1] * grid[2];
    fenced = (char*)calloc(nblocks, 1);
    shared_memory = (char*)cpu_alloc(shared, 0);
    nranges = 1;                                                 // the first range is the dynamic shared memory, watched or not
    ranges[0] = {shared_memory, shared_memory + shared, first_byte(shared_memory, shared), last_byte(shared_memory, shared),
                 1, true, (Cell*)calloc((shared >> 1) + 1, sizeof(Cell))};
    if (check) {
        watch(tls, tls, tls_size, tls + tls_size, 1, true);
        for (int i = 0; i < nbuf; ++i)
            watch(first_byte(buffers[i], sizes[i]), buffers[i], sizes[i], last_byte(buffers[i], sizes[i]), shifts[i], false);
    }
    const int signals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
    static char alternative[64 << 10];
    stack_t stack = {alternative, 0, sizeof alternative}, old_stack;
    struct sigaction action = {}, old[4];
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaltstack(&stack, &old_stack);
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &action, &old[i]);
    const int failed = sigsetjmp(escape, 1);
    if (!failed) run_grid(seed);
    for (int i = 0; i < 4; ++i) sigaction(signals[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
    for (; nranges; --nranges) free(ranges[nranges - 1].cells);
    cpu_free(shared_memory, shared);
    free(fenced);
    return failed;
}
extern "C" const char* cpu_message() { return message; }
extern "C" int cpu_reports(Report** r)
{
    *r = reports;
    return nreports;
}
