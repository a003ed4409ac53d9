"""The exit codes of a training, which launchers and schedulers act on; see docs/cluster.md."""

import signal

PASSING_EXIT_CODE = 1  # a rank died or hung, a disk was away: a start anew may help
USER_ERROR_EXIT_CODE = 2  # the message says how to mend it
PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: "try again later"; nothing else here exits with it
INTERRUPTED_EXIT_CODE = 128 + signal.SIGINT  # at once, by a second signal
