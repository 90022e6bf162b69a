"""What all tests share."""

from __future__ import annotations

import signal

# A test run that a shell starts in the background inherits an ignored SIGINT, and so would the programs that tests
# start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
