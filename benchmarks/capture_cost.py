"""What a capture costs at real sizes, without weights: seconds, memory, and from the cache.

    python benchmarks/capture_cost.py [ID ...]

For each published model (by default Llama 3.1 8B and 70B) two processes run one after the other:
the first captures the graph on the meta device and keeps it, the second starts anew and finds it.
Prints seconds of `load_model` and `capture`, peak resident memory of the process, and nodes. No
hub is asked: shapes are those that graphtune knows.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

MODELS = ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B")


def measure(folder: str) -> dict:
    import graphtune as gt

    start = time.perf_counter()
    model = gt.load_model(folder, device="meta", dtype="bfloat16")
    loaded = time.perf_counter()
    program = gt.capture(model)
    done = time.perf_counter()
    return {
        "load_s": loaded - start,
        "capture_s": done - loaded,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "nodes": len(program.graph_module.graph.nodes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ids", nargs="*", default=MODELS, help="hub ids of published models")
    parser.add_argument("--folder", help="measure this model only, print JSON")
    args = parser.parse_args()
    if args.folder:
        print(json.dumps(measure(args.folder)))
        return
    from graphtune.models.families import published_config

    print(f"{'':32} {'':8} {'load s':>7} {'capture s':>10} {'GiB':>6} {'nodes':>7}")
    for id in args.ids:
        with tempfile.TemporaryDirectory() as folder:
            config = published_config(id)
            if config is None:
                parser.error(f"{id} is no published model that graphtune knows")
            config.architectures = None
            config.save_pretrained(folder)
            environment = os.environ | {"GRAPHTUNE_CACHE": f"{folder}/cache"}
            for start in ("first", "second"):
                command = [sys.executable, __file__, "--folder", folder]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env=environment
                )
                result = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{id:32} {start:8} {result['load_s']:7.1f} {result['capture_s']:10.1f} "
                    f"{result['peak_gib']:6.2f} {result['nodes']:7,}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
