"""Files of other libraries, read into plain NumPy arrays and written from them.

Every format is a module with ``read(path) -> Run`` and ``write(path, run)``: `pt`, `huggingface`,
`cerebras`, `safetensors`. `names` translates the names of one model into those of another,
`convert` does all at once.
"""

from cerebras_jax.formats import cerebras, convert, huggingface, inert, names, pt, safetensors
from cerebras_jax.formats.run import Run
