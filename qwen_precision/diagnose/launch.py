"""torchrun as the parent of a machine's ranks, whose end is an exit code and a sentence and not a traceback.

Run as a module, with torchrun's own arguments: ``python -m qwen_precision.diagnose.launch --standalone …``.
"""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from qwen_precision.parents import PARENT, follow


def launch(words: list[str]) -> int:
    """Run all ranks; gives 0, or 3 where one ended early or a signal ended all."""
    logging.disable(logging.WARNING)  # of every step of an orderly end
    follow(lambda: os.kill(os.getpid(), signal.SIGTERM))  # torchrun ends its ranks then, and they keep what there is
    os.environ[PARENT] = str(os.getpid())  # for the ranks
    try:
        run(parse_args(words))  # type: ignore[no-untyped-call]
    except SignalException:
        return 3
    except ChildFailedError as error:
        ranks = ", ".join(f"rank {rank} ({_how(failure.exitcode)})" for rank, failure in sorted(error.failures.items()))
        sys.stderr.write(f"qprec: {ranks} ended early, and with it all others\n")
        return 3
    return 0


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
