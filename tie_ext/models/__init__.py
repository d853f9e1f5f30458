"""The networks: TIENet, its garbage head, statistics of layers, backbones, the generator."""
