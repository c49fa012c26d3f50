import torch

torch.set_num_threads(1)  # networks this small lose more to threads than they gain
