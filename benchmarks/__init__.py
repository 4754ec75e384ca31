"""Speed and memory, side by side: plain torch, shardproof and other tensor-parallel libraries.

A *work* is what is timed: `works.py` and `llama.py`. A *system* is who does it: `systems.py` and
`peers.py`. `python -m benchmarks` runs the works on the systems. `groups.py` starts the processes
of each system, and `run.py` first compares what they compute and then times them in turns. All
other modules are scripts that measure one thing: `python -m benchmarks.case_times` and so on.

These are tools of the repository. They are not installed with the package.
"""
