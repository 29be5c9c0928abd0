"""Passes: graph to graph. One pass, one file, one public function `pass_name(mod, ...) -> mod`.

The order in which they run, and why, is in `turbo_tvm/pipeline.py`. Weights stay function parameters all the way: a
pass that needs a new weight (three merged into one, say) emits an expression over the old ones, which
`pack_weights` later moves out of the model's function.
"""
