/* A guest for x86 that writes by streams: flat 32 bits, no paging, loaded by QEMU as a multiboot kernel.
 *
 * Its command line is `fill=MIB`, `poll=1` where it can't sleep (no interrupts), `seed=N`, and any number of streams, each `KIND:START:SIZE:RATE[:PERIOD:FROM:TO]`: the kind, MiB
 * from BASE on, MiB, pages a second; and, of a period of so many ms, the part in which it writes. Kinds:
 *   uniform  any page of its area, each as likely
 *   zipf     page i as often as 1/i, the pages strewn over the area
 *   stream   one page after the other, and round again
 *   zero     as stream, but every other time round it fills the page with zeros
 * Each write but those of zeros is of a number that was never written before, so that contents tell that it was made.
 * What a guest owes after it stood still is forgotten beyond CATCH_UP: the rate is one of a program that waits for work.
 */

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

enum { BASE = 16 << 20, PAGE = 4096, MOST = 8, HZ = 1000, CATCH_UP = 20 /* ms */ };

struct stream {
	char kind;
	u32 start, npages, rate, period, from, to, next, round;
	u32 octaves;	/* of zipf: 2 ** octaves pages */
	u64 done;	/* in pages * ticks of the TSC */
};

static struct stream streams[MOST];
static u32 number = 1, seed = 88172645;

static inline void out(unsigned short port, u8 value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 in(unsigned short port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u64 tsc(void) { u64 v; asm volatile("rdtsc" : "=A"(v)); return v; }

static u32 draw(u32 below)	/* Marsaglia's xorshift */
{
	seed ^= seed << 13;
	seed ^= seed >> 17;
	seed ^= seed << 5;
	return (u64)seed * below >> 32;
}

/* --- a clock of 1 kHz, so that the guest can sleep --- */

struct gate { unsigned short low, selector; u8 zero, kind; unsigned short high; } __attribute__((packed));
static struct gate idt[48];

asm(".globl tick\n"
    "tick: pushl %eax\n"
    "      movb $0x20, %al\n"
    "      outb %al, $0x20\n"
    "      popl %eax\n"
    "spurious: iret\n"
    ".globl spurious\n");
extern void tick(void), spurious(void);
/* What selectors a multiboot loader leaves is not said: these are our own. */
static u64 gdt[3] = { 0, 0x00cf9a000000ffffull, 0x00cf92000000ffffull };

static void clock(void)
{
	struct { unsigned short limit; u32 base; } __attribute__((packed))
		gdtr = { sizeof gdt - 1, (u32)gdt }, idtr = { sizeof idt - 1, (u32)idt };
	asm volatile("lgdt %0\n ljmp $8, $1f\n1: movl $16, %%eax\n movl %%eax, %%ds\n movl %%eax, %%es\n movl %%eax, %%ss"
		     : : "m"(gdtr) : "eax", "memory");
	for (int i = 32; i < 48; i++) {
		u32 handler = (u32)(i == 32 ? tick : spurious);
		idt[i] = (struct gate){ handler, 8, 0, 0x8e, handler >> 16 };
	}
	asm volatile("lidt %0" : : "m"(idtr));
	out(0x20, 0x11); out(0xa0, 0x11);	/* the PICs' interrupts go to 32 and on */
	out(0x21, 32); out(0xa1, 40);
	out(0x21, 4); out(0xa1, 2);
	out(0x21, 1); out(0xa1, 1);
	out(0x21, 0xfe); out(0xa1, 0xff);	/* the timer's alone */
	out(0x43, 0x34);
	out(0x40, (1193182 / HZ) & 255); out(0x40, (1193182 / HZ) >> 8);
	asm volatile("sti");
}

static u32 frequency(void)	/* of the TSC, in kHz: the least of ten times 10 ms, since any may be interrupted */
{
	u32 count = 1193182 / 100, least = ~0u;
	for (int i = 0; i < 10; i++) {
		out(0x61, (in(0x61) & ~2) | 1);
		out(0x43, 0xb0);
		out(0x42, count & 255); out(0x42, count >> 8);
		u64 began = tsc();
		while (!(in(0x61) & 0x20))
			;
		u32 khz = (u32)(tsc() - began) / 10;
		if (khz < least)
			least = khz;
	}
	return least;
}

/* --- the streams --- */

static u32 *page(u32 n) { return (u32 *)(BASE + n * PAGE); }

static void mark(u32 n)
{
	u32 *to = page(n);
	to[number & 1023 ? number & 1023 : 1] = number;
	to[0] = number++;
}

static void zero(u32 n)
{
	u32 *to = page(n), count = 1024;
	asm volatile("rep stosl" : "+D"(to), "+c"(count) : "a"(0) : "memory");
}

static void once(struct stream *s)
{
	u32 n;
	switch (s->kind) {
	case 'u':
		mark(s->start + draw(s->npages));
		return;
	case 'z':
		n = 1u << draw(s->octaves);
		n += draw(n);
		mark(s->start + (n * 2654435761u & ((1u << s->octaves) - 1)));
		return;
	default:
		n = s->start + s->next;
		if (s->kind == '0' && s->round & 1)
			zero(n);
		else
			mark(n);
		if (++s->next == s->npages)
			s->next = 0, s->round++;
	}
}

static void run(u32 khz, int polls)
{
	u64 last = tsc(), most = (u64)khz * CATCH_UP;
	u32 ms = 0;
	u64 part = 0;
	for (;;) {
		if (polls)
			while (tsc() - last < khz)
				asm volatile("pause");
		else
			asm volatile("hlt");
		u64 now = tsc(), passed = now - last;
		last = now;
		if (passed > most)
			passed = most;
		for (part += passed; part >= khz; part -= khz)
			ms++;
		for (struct stream *s = streams; s < streams + MOST && s->kind; s++) {
			if (s->period) {
				u32 at = ms % s->period;
				if (at < s->from || at >= s->to)
					continue;
			}
			s->done += passed * s->rate;
			for (u64 one = (u64)khz * 1000; s->done >= one; s->done -= one)
				once(s);
		}
	}
}

/* --- the command line --- */

static const char *number_at(const char *at, u32 *value)
{
	for (*value = 0; *at >= '0' && *at <= '9'; at++)
		*value = *value * 10 + *at - '0';
	return at;
}

void start(u32 magic, u32 info)
{
	const char *at = (const char *)((u32 *)info)[4];
	u32 fill = 0, count = 0, polls = 0;
	(void)magic;
	while (*at) {
		while (*at == ' ')
			at++;
		const char *word = at;
		while (*at && *at != ' ' && *at != ':' && *at != '=')
			at++;
		if (*at == '=') {
			u32 value;
			at = number_at(at + 1, &value);
			if (*word == 'f')
				fill = value;
			else if (*word == 'p')
				polls = value;
			else
				seed += value;
		} else if (*at == ':' && count < MOST) {
			struct stream *s = &streams[count++];
			u32 *fields[] = { &s->start, &s->npages, &s->rate, &s->period, &s->from, &s->to };
			s->kind = *word == 'z' && word[1] == 'e' ? '0' : *word;
			for (int i = 0; *at == ':' && i < 6; i++)
				at = number_at(at + 1, fields[i]);
			s->start *= 256;
			s->npages *= 256;
			while (2u << s->octaves <= s->npages)
				s->octaves++;
		}
	}
	u32 khz = frequency();
	if (!polls)
		clock();
	for (u32 n = 0; n < fill * 256; n++)
		mark(n);
	*page(fill * 256) = 0x600dbeef;	/* ready: the harness looks for it */
	run(khz, polls);
}

/* Multiboot: magic, flags (page aligned), checksum; eax and ebx are the arguments. */
asm(".section .multiboot, \"a\"\n"
    ".long 0x1badb002, 1, -(0x1badb002 + 1)\n"
    ".text\n"
    ".globl entry\n"
    "entry: movl $stack + 16384, %esp\n"
    "       pushl %ebx\n"
    "       pushl %eax\n"
    "       call start\n"
    ".bss\n"
    ".align 16\n"
    "stack: .skip 16384\n"
    ".text\n");
