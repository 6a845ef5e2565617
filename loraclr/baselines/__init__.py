"""What others do to merge LoRAs: on weights (`arithmetic`) and on a layer's inputs (`fitting`)."""
