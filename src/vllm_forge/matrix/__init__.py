"""matrix.toml, parsed once into frozen records."""

from vllm_forge.matrix.cells import ImageCell as ImageCell
from vllm_forge.matrix.cells import find_root as find_root
from vllm_forge.matrix.cells import image_cell as image_cell
from vllm_forge.matrix.cells import load as load
from vllm_forge.matrix.cells import schema_text as schema_text
from vllm_forge.matrix.cells import serve_arguments as serve_arguments
from vllm_forge.matrix.model import Artifact as Artifact
from vllm_forge.matrix.model import Base as Base
from vllm_forge.matrix.model import FrozenModel as FrozenModel
from vllm_forge.matrix.model import Line as Line
from vllm_forge.matrix.model import Matrix as Matrix
from vllm_forge.matrix.model import Preset as Preset
from vllm_forge.matrix.model import Sku as Sku
from vllm_forge.matrix.model import WheelFile as WheelFile
