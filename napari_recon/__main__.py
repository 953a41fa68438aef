"""``python -m napari_recon``: the command line, and with a launcher in front ``torchrun ... -m napari_recon``."""

from napari_recon.cli import main

if __name__ == "__main__":
    main()
