"""Points in the work at which a test can kill the process, as `kill -9` or a power cut would.

    PIPELINE_TEST_KILL="row_store.commit:3" python -m pipeline.generate

sends SIGKILL to the process when it passes the point `row_store.commit` for the third time. Each process counts its own
passes. Without the variable a pass costs one comparison of strings.

| point                  | state when the process passes it                                                    |
|------------------------|-------------------------------------------------------------------------------------|
| file.rename            | a file's bytes are on the disk under a temporary name (any atomic write of a file)  |
| row_store.commit       | a shard's rows are in memory, nothing of them is written                            |
| row_store.committed    | the shard is on the disk                                                            |
| row_store.merge        | a merged shard is on the disk, so are the shards that it replaces                   |
| part_store.commit      | a part is in memory, nothing of it is written                                       |
| part_store.committed   | the part is on the disk                                                             |
| artifact.commit        | all files and the manifest are on the disk; the target is still the old artifact    |
| artifact.swap          | (only where two paths cannot be exchanged) the old one is moved away, no new one    |
| checkpoint.commit      | a training checkpoint is in memory; the file is still the previous one              |
| checkpoint.committed   | the checkpoint is on the disk                                                       |
"""

import itertools
import os
import signal

VARIABLE = "PIPELINE_TEST_KILL"
_POINT, _, _PASS = os.environ.get(VARIABLE, "").partition(":")
_passes = itertools.count(1)


def fault_point(name: str) -> None:
    """Kill this process if PIPELINE_TEST_KILL names this pass of the point `name`."""
    if name == _POINT and next(_passes) == int(_PASS):
        os.kill(os.getpid(), signal.SIGKILL)
