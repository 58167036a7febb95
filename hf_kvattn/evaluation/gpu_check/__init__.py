"""`hf-kvattn gpu-check`: whether everything works on this machine's GPU, and how fast it is, in ten minutes.

`stages.py` has the table of stages, `bars.py` that of the bars which their figures are held against. A stage is a
function in a file of its own, or in one with related stages. `running.py` runs them; `rehearsal.py` stands in for the
GPU, so that all of it runs on a CPU.
"""
