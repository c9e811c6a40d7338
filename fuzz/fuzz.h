/* fuzz.h - what a fuzz target consists of.
 *
 * A target is linked to libFuzzer, or to driver.c where the compiler has none. It ends the process
 * when something does not hold.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

int LLVMFuzzerInitialize(int *argc, char ***argv); /* libFuzzer's; prints the summary at exit */
int LLVMFuzzerTestOneInput(const uint8_t *input, size_t bytes); /* always 0 */

/* Prints how many inputs the target has had. Returns whether they were of use: some were accepted,
 * and some were not. */
bool fuzz_summary(void);
