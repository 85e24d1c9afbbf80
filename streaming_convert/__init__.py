"""Pictures and latents to datasets of MosaicML Streaming; checks and looks at them."""
