"""The commands beside LightningCLI's: one file each."""
