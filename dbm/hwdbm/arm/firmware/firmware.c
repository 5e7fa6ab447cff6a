/*
 * A small hypervisor, for machines whose stage-2 tables are tracked from outside.
 *
 * CPU 0 stays at EL2 and serves the doorbell: it builds the tables that the host has planned, starts the other CPUs,
 * and flushes TLBs. Each other CPU runs a guest at EL1. A guest looks at shared->stop after each store and comes back
 * by HVC when it is set, so that a CPU that is PAUSED has neither a store nor a count half done.
 */
#include "abi.h"

#define box ((volatile struct mailbox *)MAILBOX)
#define shared ((volatile struct shared *)SHARED)

#define read(reg) ({ u64 _v; asm volatile("mrs %0, " #reg : "=r"(_v) :: "memory"); _v; })
#define write(reg, v) asm volatile("msr " #reg ", %0" :: "r"((u64)(v)) : "memory")
#define dsb() asm volatile("dsb ish" ::: "memory")
#define isb() asm volatile("isb" ::: "memory")

/* GICv2, for one thing only: that the timer of EL2 wakes a CPU from WFI. No interrupt is ever taken. */
#define GICD(reg) (*(volatile u32 *)(0x08000000UL + (reg)))
#define GICC(reg) (*(volatile u32 *)(0x08010000UL + (reg)))
#define HYP_TIMER 26
#define TICKS 10000 /* of the counter's, that CPU 0 sleeps when nobody rings */

enum { HVC_STOP, HVC_SLEEP, HVC_CRASH, HVC_DONE };
enum { EC_HVC = 0x16, EC_INSTRUCTION = 0x20, EC_DATA = 0x24 };

extern void enter(volatile struct vcpu *);
extern void secondary(void);
extern void guest_main(void);
extern u8 guest_vectors[];

static void init_cpu(void)
{
	GICD(0x000) = 1;
	GICD(0x100) = 1 << HYP_TIMER;
	GICC(0x004) = 0xff;
	GICC(0x000) = 1;
	write(cnthctl_el2, 3); /* guests may read the counter */
	write(cntvoff_el2, 0);
	write(cptr_el2, 0x33ff);
	isb();
}

static void sleep(u64 ticks)
{
	write(cnthp_tval_el2, ticks);
	write(cnthp_ctl_el2, 1);
	isb();
	asm volatile("wfi" ::: "memory");
	write(cnthp_ctl_el2, 0);
	isb();
}

/* --- stage-2 tables -------------------------------------------------------------------------------------- */

static u64 new_table(void)
{
	u64 used = box->used;

	if (used == box->tables)
		return 0;
	box->used = used + 1;
	return ((volatile u64 *)box->tables_pa)[used];
}

static void wipe(u64 pa, u64 size)
{
	for (u64 i = 0; i < size / 8; i++) /* other junk in each entry, and none of it valid */
		((volatile u64 *)pa)[i] = box->junk ? box->junk * (2 * i + 1) & ~1UL : 0;
}

static u64 shift_of(long level)
{
	u64 shift = box->page_shift;

	return shift + (shift - 3) * (3 - level);
}

/* Returns false where no table is left. */
static int map_one(u64 ipa, u64 pa, long level, u64 bits)
{
	u64 shift = box->page_shift, entries = 1UL << (shift - 3);
	long at = (long)box->start_level;
	/* The start level may be several tables in a row: its index is as wide as it must be. */
	volatile u64 *entry = (volatile u64 *)box->root + (ipa >> shift_of(at));

	for (; at < level; at++) {
		if (!(*entry & 1)) {
			u64 table = new_table();

			if (!table)
				return 0;
			wipe(table, 1UL << shift);
			*entry = table | box->table_bits | 3;
		}
		entry = (volatile u64 *)(*entry & 0x0000fffffffff000UL & ~((1UL << shift) - 1));
		entry += ipa >> shift_of(at + 1) & (entries - 1);
	}
	*entry = pa | bits;
	return 1;
}

static void build(void)
{
	volatile struct mapping *map = (volatile struct mapping *)box->mappings_pa;

	box->used = 0;
	box->failed = 0;
	wipe(box->root, box->root_tables << box->page_shift);
	for (u64 i = 0; i < box->mappings; i++, map++)
		for (u64 at = 0; at < map->size; at += 1UL << shift_of((long)map->level))
			if (!map_one(map->ipa + at, map->pa + at, (long)map->level, map->bits)) {
				box->failed = map->ipa + at + 1;
				return;
			}
	dsb();
}

/* --- CPU 0: the doorbell --------------------------------------------------------------------------------- */

static long smc(u64 function, u64 a, u64 b, u64 c)
{
	register u64 x0 asm("x0") = function;
	register u64 x1 asm("x1") = a;
	register u64 x2 asm("x2") = b;
	register u64 x3 asm("x3") = c;

	asm volatile("smc #0" : "+r"(x0), "+r"(x1), "+r"(x2), "+r"(x3) :: "memory");
	return (long)x0;
}

static void set_stage2(void)
{
	write(vtcr_el2, box->vtcr);
	write(vttbr_el2, box->vttbr);
	isb();
}

static void serve(u64 command)
{
	switch (command) {
	case BUILD:
		build();
		break;
	case START:
		set_stage2();
		asm volatile("tlbi alle1is" ::: "memory");
		dsb();
		for (u64 i = 1; i <= box->vcpus; i++)
			if (smc(0xc4000003, i, (u64)secondary, i)) /* PSCI CPU_ON */
				box->vcpu[i - 1].state = CRASHED;
		break;
	case FLUSH:
		dsb();
		asm volatile("tlbi vmalls12e1is" ::: "memory");
		dsb();
		isb();
		break;
	case FLUSH_PAIR:
		/* Stage 2 first, and complete: a walk in between could refill stage 1 from what is stale. */
		dsb();
		for (u64 at = 0; at < box->flush_size; at += 1UL << box->page_shift)
			asm volatile("tlbi ipas2e1is, %0" :: "r"((box->flush_ipa + at) >> 12) : "memory");
		dsb();
		asm volatile("tlbi vmalle1is" ::: "memory");
		dsb();
		isb();
		break;
	}
}

void service_main(void)
{
	u64 seen = 0;

	init_cpu();
	/* TLBIs of EL1 act on the VMID in VTTBR_EL2 whatever VM says; without VM, EL2's own accesses aren't touched. */
	write(hcr_el2, 1UL << 31);
	box->mmfr1 = read(id_aa64mmfr1_el1);
	box->sizes[0] = sizeof(struct mailbox);
	box->sizes[1] = sizeof(struct task);
	box->guest = (u64)guest_main;
	box->vectors = (u64)guest_vectors;
	box->answered = seen;
	dsb();
	box->magic = MAGIC;
	for (u64 quiet = 0;; quiet++) {
		u64 rung = box->doorbell;

		if (rung == seen) {
			if (quiet > 2000)
				sleep(TICKS);
			continue;
		}
		dsb();
		serve(box->command);
		seen = rung;
		dsb();
		box->answered = seen;
		quiet = 0;
	}
}

/* --- the other CPUs -------------------------------------------------------------------------------------- */

/* Only what differs: a write of these may flush the TLB, and a flush that nobody asked for hides that one is missing. */
#define change(reg, v) do { if (read(reg) != (v)) write(reg, v); } while (0)

static void load(volatile struct vcpu *vcpu)
{
	change(hcr_el2, vcpu->hcr);
	change(sctlr_el1, vcpu->sctlr);
	change(tcr_el1, vcpu->tcr);
	change(ttbr0_el1, vcpu->ttbr0);
	change(mair_el1, vcpu->mair);
	change(vbar_el1, vcpu->vbar);
	change(elr_el1, vcpu->elr);
	change(spsr_el1, vcpu->spsr);
	isb();
}

static void save(volatile struct vcpu *vcpu)
{
	vcpu->sctlr = read(sctlr_el1);
	vcpu->tcr = read(tcr_el1);
	vcpu->ttbr0 = read(ttbr0_el1);
	vcpu->mair = read(mair_el1);
	vcpu->vbar = read(vbar_el1);
	vcpu->elr = read(elr_el1);
	vcpu->spsr = read(spsr_el1);
}

static void pause(volatile struct vcpu *vcpu)
{
	save(vcpu);
	dsb(); /* what the guest stored, and what hardware marked for it, is in memory before the host is told */
	vcpu->state = PAUSED;
	while (shared->stop)
		sleep(TICKS);
	dsb();
	vcpu->state = RUNNING;
	load(vcpu);
}

static void crash(volatile struct vcpu *vcpu)
{
	save(vcpu);
	dsb();
	vcpu->state = CRASHED;
	for (;;)
		sleep(1000 * TICKS);
}

void vcpu_main(u64 number)
{
	volatile struct vcpu *vcpu = &box->vcpu[number - 1];

	init_cpu();
	write(vpidr_el2, read(midr_el1));
	write(vmpidr_el2, read(mpidr_el1));
	set_stage2();
	load(vcpu);
	pause(vcpu);
	for (;;) {
		u64 esr, ec;

		enter(vcpu);
		esr = read(esr_el2);
		ec = esr >> 26 & 0x3f;
		if (ec == EC_HVC) {
			if ((esr & 0xffff) == HVC_CRASH)
				crash(vcpu);
			if ((esr & 0xffff) == HVC_SLEEP)
				sleep(vcpu->x[0]);
		} else if (ec == EC_DATA || ec == EC_INSTRUCTION) {
			vcpu->fault_ipa = (read(hpfar_el2) >> 4 & 0xfffffffffffUL) << 12 | (read(far_el2) & 0xfff);
			vcpu->fault_esr = esr;
			vcpu->faults++;
			if (vcpu->skip && ec == EC_DATA)
				vcpu->pc += 4;
			else
				sleep(TICKS / 10); /* the host is about to make what it broke */
		} else {
			vcpu->fault_esr = esr;
			crash(vcpu);
		}
		if (shared->stop)
			pause(vcpu);
	}
}
