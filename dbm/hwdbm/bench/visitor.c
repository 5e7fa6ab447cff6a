/* What a kernel's page-table walker costs: a loop that calls a function for each descriptor, through a pointer, with
 * a context that is filled in for it. The visitor does what hwdbm's harvest does: test, mark, re-protect. */

#include <stddef.h>
#include <stdint.h>

struct context {
	uint64_t *ptep;
	uint64_t old;
	size_t index;
	void *arg;
};

struct harvest {
	uint64_t mask, value, clear;
	uint64_t *words;
};

typedef int (*visitor_fn)(const struct context *ctx);

int harvest_visitor(const struct context *ctx)
{
	struct harvest *harvest = ctx->arg;

	if ((ctx->old & harvest->mask) == harvest->value) {
		harvest->words[ctx->index / 64] |= (uint64_t)1 << ctx->index % 64;
		*ctx->ptep = ctx->old & ~harvest->clear;
	}
	return 0;
}

int walk(uint64_t *pte, size_t n, visitor_fn volatile visitor, struct harvest *harvest)
{
	for (size_t i = 0; i < n; i++) {
		struct context ctx = { .ptep = &pte[i], .old = *(volatile uint64_t *)&pte[i], .index = i, .arg = harvest };
		int error = visitor(&ctx);

		if (error)
			return error;
	}
	return 0;
}
