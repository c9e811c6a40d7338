/* fst_header.h - what a parsed header says, to C. */
#pragma once

#include "fst.h"

const fst_layout_view *fst_layout_get(const fst_layout *layout);
