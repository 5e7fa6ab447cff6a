/*
 * Guests: they never stop writing, and count what they wrote.
 *
 * A store comes first and its count second, and only what can be read back is counted: so a store that was skipped
 * isn't, and between two pauses a page was written if, and but for failed atomics only if, its count has changed.
 */
#include "abi.h"

#define shared ((volatile struct shared *)SHARED)

struct guest {
	volatile struct task *task;
	u64 next, since; /* of the counter */
	u64 page, first, pages;
};

static inline u64 counter(void)
{
	u64 now;

	asm volatile("isb\n\tmrs %0, cntvct_el0" : "=r"(now) :: "memory");
	return now;
}

static inline u64 frequency(void)
{
	u64 hz;

	asm volatile("mrs %0, cntfrq_el0" : "=r"(hz));
	return hz;
}

#define hvc(n, value) do { register u64 _x0 asm("x0") = (value); \
	asm volatile("hvc #" #n : "+r"(_x0) :: "memory"); } while (0)

static inline u64 random(volatile struct task *task)
{
	u64 x = task->random;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	task->random = x;
	return x;
}

static inline void count(volatile struct task *task, u64 address)
{
	((volatile u32 *)task->counts)[(address - task->origin) >> task->page_shift]++;
	task->stores++;
}

static inline void put(volatile struct task *task, u64 address, u64 value)
{
	*(volatile u64 *)address = value;
	if (*(volatile u64 *)address == value)
		count(task, address);
}

/* Stop and go: whatever the host wants of a guest. */
static void look(struct guest *guest)
{
	volatile struct task *task = guest->task;
	u64 hz, rate = shared->rate[task->vcpu], percent = shared->percent, now;

	if (task->limit && task->stores >= task->limit) {
		task->done = 1;
		while (!shared->stop)
			hvc(1, 20000);
	}
	if (shared->stop) {
		hvc(0, 0);
		guest->next = guest->since = counter();
		return;
	}
	if (!rate && !percent)
		return;
	hz = frequency();
	now = counter();
	if (rate) {
		/* Neither make up for long, nor wait for the counter of the machine that the guest came from. */
		if (guest->next + hz / 100 < now)
			guest->next = now - hz / 100;
		if (guest->next > now + hz / rate + hz / 100)
			guest->next = now;
		guest->next += hz / rate;
		if (guest->next > now + hz / 2000)
			hvc(1, guest->next - now);
	}
	if (percent && now - guest->since > hz / 1000) {
		u64 rest = (now - guest->since) * percent / (100 - percent);

		hvc(1, rest < hz / 20 ? rest : hz / 20);
		guest->since = counter();
	}
}

static inline u64 own(struct guest *guest, u64 page)
{
	/* Where a vCPU writes in a page: no two in the same line, and none where pairs are. */
	return guest->task->base + (page << guest->task->page_shift) + 64 * (guest->task->vcpu + 1);
}

static void atomics(volatile struct task *task, u64 at, u64 number)
{
	u64 old, other = ~number;

	switch (number % 5) {
	case 0:
		asm volatile("ldadd %1, %0, [%2]" : "=&r"(old) : "r"(number | 1), "r"(at) : "memory");
		break;
	case 1:
		asm volatile("swpal %1, %0, [%2]" : "=&r"(old) : "r"(number), "r"(at) : "memory");
		break;
	case 2:
		asm volatile("stset %0, [%1]" :: "r"(1UL << (number % 61)), "r"(at) : "memory");
		break;
	case 3:
		old = *(volatile u64 *)at;
		asm volatile("casal %0, %1, [%2]" : "+r"(old) : "r"(number), "r"(at) : "memory");
		break;
	default: /* compares with what isn't there: it changes nothing, and the page may be marked all the same */
		other ^= *(volatile u64 *)at;
		asm volatile("casal %0, %1, [%2]" : "+r"(other) : "r"(number), "r"(at) : "memory");
		return;
	}
	count(task, at);
}

static void pairs(struct guest *guest, u64 page, u64 number)
{
	volatile struct task *task = guest->task;
	u64 end, half = number & 0xffffffff;

	if (page + 1 >= guest->pages)
		page = 0;
	end = task->base + ((page + 1) << task->page_shift);
	if (number & 1) { /* one store, four bytes of it on either side */
		u64 both = half << 32 | half, back;

		asm volatile("str %1, [%2]\n\tldr %0, [%2]" : "=&r"(back) : "r"(both), "r"(end - 4) : "memory");
		if (back != both)
			return;
	} else { /* two registers, one on either side */
		u64 one, two;

		asm volatile("stp %2, %2, [%3]\n\tldp %0, %1, [%3]" : "=&r"(one), "=&r"(two) : "r"(number), "r"(end - 8) : "memory");
		if (one != number || two != number)
			return;
	}
	count(task, end - 8);
	count(task, end);
}

static void zero(struct guest *guest, u64 page, u64 number)
{
	volatile struct task *task = guest->task;
	u64 size, at;

	asm volatile("mrs %0, dczid_el0" : "=r"(size));
	size = 4UL << (size & 15); /* 512 at most, so that each vCPU has a line of its own */
	at = task->base + (page << task->page_shift) + 512 * (task->vcpu + 1);
	*(volatile u64 *)at = number;
	asm volatile("dc zva, %0" :: "r"(at & ~(size - 1)) : "memory");
	if (!*(volatile u64 *)at)
		count(task, at);
}

/* --- a guest with a stage 1 of its own ------------------------------------------------------------------- */

/* Its tables lie at the beginning of what it writes: the walker's updates of AF and of the dirty state are writes too.
 * 1 GiB from 0x40000000 on is one block; its own pages are mapped one by one, old and clean. */
#define S1_PAGE(pa) ((pa) | 0x703UL)  /* inner shareable, AP[2:1] = 00; AF among them */
#define S1_AF (1UL << 10)
#define S1_RO (1UL << 7)
#define S1_DBM (1UL << 51)
#define TABLES 34 /* 4K pages: level 1, level 2, and level 3 for 64 MiB */

static u64 *s1_entry(u64 base, u64 address)
{
	u64 first = base >> 21, table = (address >> 21) - first;

	return (u64 *)(base + 0x2000 + (table << 12)) + (address >> 12 & 511);
}

static void s1_on(volatile struct task *task)
{
	u64 base = task->base, end = base + task->size, top = (base & ~0x1fffffUL) + (64UL << 20);
	u64 *one = (u64 *)base, *two = (u64 *)(base + 0x1000);

	if (end > top)
		task->size = top - base;
	for (u64 i = 0; i < TABLES * 512; i++)
		one[i] = 0;
	one[1] = 0x40000000UL | 0x701; /* a block, AF and inner shareable */
	one[base >> 30] = (u64)two | 3;
	for (u64 at = base; at < base + task->size; at += 4096) {
		two[at >> 21 & 511] = (u64)s1_entry(base, at & ~0x1fffffUL) | 3;
		/* The tables themselves are mapped as memory that nothing has to be recorded of. */
		*s1_entry(base, at) = at < base + TABLES * 4096 ? S1_PAGE(at) : (S1_PAGE(at) & ~S1_AF) | S1_DBM | S1_RO;
	}
	for (u64 at = base; at < base + TABLES * 4096; at += 4096)
		count(task, at);
	asm volatile("dsb ish" ::: "memory");
	asm volatile("msr mair_el1, %0" :: "r"(0xffUL));
	/* 32 bits, 4K, write-back and inner shareable, no TTBR1, 40-bit addresses, HA and HD. */
	asm volatile("msr tcr_el1, %0" :: "r"(32UL | 1UL << 8 | 1UL << 10 | 3UL << 12 | 1UL << 23 | 2UL << 32 | 3UL << 39));
	asm volatile("msr ttbr0_el1, %0\n\tisb\n\ttlbi vmalle1\n\tdsb ish\n\tisb" :: "r"(base));
	asm volatile("msr sctlr_el1, %0\n\tisb" :: "r"(0x30d01805UL) : "memory");
}

static void s1_store(struct guest *guest, u64 page, u64 number)
{
	volatile struct task *task = guest->task;
	u64 skip = (TABLES * 4096UL + (1UL << task->page_shift) - 1) >> task->page_shift;
	u64 at, before;
	volatile u64 *entry;

	if (guest->pages <= skip)
		return;
	at = own(guest, skip + page % (guest->pages - skip));
	entry = (volatile u64 *)s1_entry(task->base, at);
	if (number % 3 == 0) { /* age and clean it, as a kernel does */
		*entry = (*entry & ~S1_AF) | S1_RO;
		count(task, (u64)entry);
		asm volatile("dsb ishst\n\ttlbi vaae1, %0\n\tdsb ish\n\tisb" :: "r"(at >> 12) : "memory");
	}
	before = *entry;
	put(task, at, number);
	asm volatile("dsb ish" ::: "memory");
	if (*entry != before) { /* the walker wrote to the table */
		count(task, (u64)entry);
		task->walked++;
	}
}

/* --------------------------------------------------------------------------------------------------------- */

void guest_main(volatile struct task *task)
{
	struct guest guest = { .task = task };

	if (task->kind == STAGE1)
		s1_on(task);
	guest.pages = task->size >> task->page_shift;
	guest.next = guest.since = counter();
	for (;;) {
		u64 page = guest.page, kind = task->kind, number;

		if (kind == IDLE) {
			look(&guest);
			hvc(1, 20000);
			continue;
		}
		number = task->number++;
		if (kind == SEQUENTIAL || kind == STAGE1) {
			guest.page = page + 1 < guest.pages ? page + 1 : 0;
		} else if (kind == WINDOW) {
			if (number % 64 == 0)
				guest.first = guest.first + 1 < guest.pages ? guest.first + 1 : 0;
			page = (guest.first + random(task) % (task->window ? task->window : 1)) % guest.pages;
		} else {
			page = random(task) % guest.pages;
		}
		switch (kind) {
		case ATOMICS:
			atomics(task, own(&guest, page), number);
			break;
		case PAIRS:
			pairs(&guest, page, number);
			break;
		case ZERO:
			zero(&guest, page, number);
			break;
		case STAGE1:
			s1_store(&guest, page, number);
			break;
		default:
			put(task, own(&guest, page), number << 3 | task->vcpu);
		}
		look(&guest);
	}
}
