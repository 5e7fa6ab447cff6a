/* Entry, exception vectors, and the way into a guest and back. A struct vcpu begins with x0..x30, sp, pc, pstate. */
#include "abi.h"
#define SP_AT 248
#define PC_AT 256
#define PSTATE_AT 264

	.section .text.start, "ax"
	.globl _start, secondary
_start:
	mov x0, #0
secondary:                      /* x0: the CPU's number */
	ldr x1, =stacks + 4096
	lsl x2, x0, #12
	add x1, x1, x2
	mov sp, x1
	ldr x1, =vectors
	msr vbar_el2, x1
	isb
	cbz x0, 1f
	bl vcpu_main
1:	bl service_main

/* void enter(struct vcpu *): run a guest until it comes back to EL2. */
	.globl enter
enter:
	stp x29, x30, [sp, #-96]!
	stp x19, x20, [sp, #16]
	stp x21, x22, [sp, #32]
	stp x23, x24, [sp, #48]
	stp x25, x26, [sp, #64]
	stp x27, x28, [sp, #80]
	msr tpidr_el2, x0
	ldp x1, x2, [x0, #PC_AT]
	msr elr_el2, x1
	msr spsr_el2, x2
	ldr x1, [x0, #SP_AT]
	msr sp_el1, x1
	ldp x2, x3, [x0, #16]
	ldp x4, x5, [x0, #32]
	ldp x6, x7, [x0, #48]
	ldp x8, x9, [x0, #64]
	ldp x10, x11, [x0, #80]
	ldp x12, x13, [x0, #96]
	ldp x14, x15, [x0, #112]
	ldp x16, x17, [x0, #128]
	ldp x18, x19, [x0, #144]
	ldp x20, x21, [x0, #160]
	ldp x22, x23, [x0, #176]
	ldp x24, x25, [x0, #192]
	ldp x26, x27, [x0, #208]
	ldp x28, x29, [x0, #224]
	ldr x30, [x0, #240]
	ldp x0, x1, [x0]
	eret

/* A guest came back: keep its registers, and return to who entered it. */
left:
	stp x0, x1, [sp, #-16]!
	mrs x0, tpidr_el2
	stp x2, x3, [x0, #16]
	stp x4, x5, [x0, #32]
	stp x6, x7, [x0, #48]
	stp x8, x9, [x0, #64]
	stp x10, x11, [x0, #80]
	stp x12, x13, [x0, #96]
	stp x14, x15, [x0, #112]
	stp x16, x17, [x0, #128]
	stp x18, x19, [x0, #144]
	stp x20, x21, [x0, #160]
	stp x22, x23, [x0, #176]
	stp x24, x25, [x0, #192]
	stp x26, x27, [x0, #208]
	stp x28, x29, [x0, #224]
	str x30, [x0, #240]
	ldp x1, x2, [sp], #16
	stp x1, x2, [x0]
	mrs x1, elr_el2
	mrs x2, spsr_el2
	stp x1, x2, [x0, #PC_AT]
	mrs x1, sp_el1
	str x1, [x0, #SP_AT]
	ldp x19, x20, [sp, #16]
	ldp x21, x22, [sp, #32]
	ldp x23, x24, [sp, #48]
	ldp x25, x26, [sp, #64]
	ldp x27, x28, [sp, #80]
	ldp x29, x30, [sp], #96
	ret

	.balign 2048
vectors:                        /* from EL2 itself: a fault of the firmware, and the CPU stays here */
	.rept 8
	b .
	.balign 128
	.endr
	.rept 4                 /* from a guest, whatever it is */
	b left
	.balign 128
	.endr
	.rept 4
	b .
	.balign 128
	.endr

	.balign 2048
	.globl guest_vectors
guest_vectors:                  /* a guest has no exceptions of its own: it has crashed */
	.rept 16
	hvc #2
	b .
	.balign 128
	.endr
