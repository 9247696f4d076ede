"""The engine of the benchmarks on a real model. A cell fine-tunes the aligned model in one way and measures safety and
utility; its result is kept. The frontier is one plan of cells, `benchmarks/guardspace.py` another.
"""
