#include "int4_rows.h"

#include "interface.h"

using namespace sinkexport;

SINKEXPORT_KERNEL(int4_rows, Int4RowsParams, int4RowsProblem, launchInt4Rows)
