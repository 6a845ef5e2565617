"""What others do to merge LoRAs: on weights (`arithmetic`, `blocks`) and on a layer's inputs (`fitting`)."""
