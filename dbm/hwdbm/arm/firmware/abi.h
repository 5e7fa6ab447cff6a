/* What the host and the firmware say to each other, through RAM that both have. hwdbm/arm/abi.py says the same. */
#ifndef HWDBM_ABI_H
#define HWDBM_ABI_H

#define FIRMWARE 0x40200000 /* where it is linked, and runs: at EL2, and its guests at EL1 */
#define MAILBOX 0x40400000  /* a page of 64K for the host and EL2 */
#define SHARED 0x40410000   /* one that guests may read */
#define MAGIC 0x314d524142445748 /* "HWDBARM1" */
#define VCPUS 7

#ifndef __ASSEMBLER__
typedef unsigned int u32;
typedef unsigned long u64;
typedef unsigned char u8;

enum command { BUILD = 1, START, FLUSH, FLUSH_PAIR };
enum state { OFF, PAUSED, RUNNING, CRASHED };
enum kind { IDLE, SEQUENTIAL, RANDOM, WINDOW, ATOMICS, PAIRS, ZERO, STAGE1 };

/* A vCPU: first its registers, as start.S has them. */
struct vcpu {
	u64 x[31], sp, pc, pstate;
	u64 sctlr, tcr, ttbr0, mair, vbar, elr, spsr;
	u64 hcr;      /* HCR_EL2 while it runs */
	u64 skip;     /* whether what faults is skipped; otherwise it is tried again */
	u64 state;    /* enum state: written by EL2 */
	u64 faults;   /* stage-2 faults so far, and the last one */
	u64 fault_ipa, fault_esr;
	u64 spare[8];
};

/* Maps [ipa, ipa + size) to [pa, pa + size) by leaves of a level. */
struct mapping {
	u64 ipa, pa, size, level;
	u64 bits; /* all of a leaf but its address */
};

struct mailbox {
	u64 magic;              /* written by EL2 when it listens, after the sizes of this and of a task */
	u64 sizes[2], mmfr1;    /* ID_AA64MMFR1_EL1 */
	u64 doorbell, answered; /* the host counts up one, EL2 the other when it is done */
	u64 command;            /* enum command */
	u64 failed;             /* what BUILD had no table for: an IPA + 1 */
	u64 guest;              /* where a guest's code begins, and its exception vectors */
	u64 vectors;
	u64 vcpus;
	u64 vtcr, vttbr;
	/* The plan that BUILD follows. */
	u64 root, page_shift, start_level, root_tables;
	u64 mappings, mappings_pa;
	u64 tables, tables_pa;   /* addresses of tables to use, in this order */
	u64 used;                /* as many were */
	u64 junk;                /* what invalid entries hold, without bit 0 */
	u64 table_bits;          /* what table descriptors have beside their address */
	u64 flush_ipa, flush_size; /* what FLUSH_PAIR is of, in whole pages */
	struct vcpu vcpu[VCPUS];
};

/* Guests may read it. */
struct shared {
	u64 stop;            /* whether all are to stop */
	u64 percent;         /* how much of their time is taken from them */
	u64 rate[VCPUS];     /* stores a second; 0: no limit */
};

/* What a guest does: in its own memory, which it may write. */
struct task {
	u64 kind, vcpu;
	u64 base, size;      /* where it writes */
	u64 page_shift;      /* of what it counts */
	u64 counts;          /* a u32 for each page from `origin` on: how often it was written */
	u64 origin;
	u64 window;          /* pages */
	u64 random;          /* the generator's state, not 0 */
	u64 number;          /* what is stored next */
	u64 stores;
	u64 limit;           /* stop for good after so many stores; 0: never */
	u64 done;
	u64 walked;          /* descriptors of stage 1 that hardware was seen to change */
};
#endif
#endif
