"""The networks: TIENet, its garbage head, what layers say of an image, backbones, generator."""
