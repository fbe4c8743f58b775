"""What takes the time: the operations of a task by their share of it, from TensorFlow's profiler.

    python benchmarks/op_profile.py F1 "small-batch training"
    python benchmarks/op_profile.py C1 "Hessian-vector product" 2500      # over so many samples

Operations run beside each other and in several threads, so their times add up to more than the wall time. Before the
profile, without the profiler: the share of the time in which the cores are busy, and how often threads hand over.
"""

import os
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from rooms import data_of

TOP = 20


def main() -> None:
    """Run the task three times, the last time under the profiler; print its operations."""
    from ours import Ours
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    from large_batch.backend import tf

    network, task = sys.argv[1:3]
    samples = int(sys.argv[3]) if len(sys.argv) > 3 else len(data_of(network).x_train)
    work = Ours(network, task, samples)
    work.run()
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work.run()
    after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - began
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    switches = after.ru_nvcsw - before.ru_nvcsw
    print(f"{network} {task}, {samples:,} samples: {wall:.2f} s without the profiler")
    print(f"cores busy {100 * busy / wall / os.cpu_count():.0f} %, {switches:,} changes of thread")
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        began = time.perf_counter()
        work.run()
        wall = time.perf_counter() - began
        tf.profiler.experimental.stop()
        space = xplane_pb2.XSpace.FromString(next(Path(folder).rglob("*.xplane.pb")).read_bytes())
    seconds, times = Counter(), Counter()
    for plane in space.planes:
        for line in plane.lines:
            for event in line.events:
                operation = plane.event_metadata[event.metadata_id].name.split(":")[-1].strip()
                operation = re.sub(r"(_\d+)?(\.\d+)?$", "", operation)  # XLA numbers its operations
                seconds[operation] += event.duration_ps / 1e12
                times[operation] += 1
    frames = {"Process", "Run", "EagerExecute", "EagerKernelExecute", "TFE_Py_ExecuteCancelable"}
    frames |= {"Execute", "ExecuteAsyncOnStream", "Start", "Done", "Await", "BlockUntilReady"}  # XLA's
    print(f"with it: {wall:.2f} s")
    operations = [each for each in seconds.most_common() if each[0] not in frames and not each[0].startswith("_")]
    kernels = [each for each in seconds.most_common() if each[0].startswith("_Mkl")]
    for operation, spent in sorted([*operations, *kernels], key=lambda each: -each[1])[:TOP]:
        print(f"{100 * spent / wall:6.1f} %  {times[operation]:6,} x  {operation}")


if __name__ == "__main__":
    main()
