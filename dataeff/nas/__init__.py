"""Architecture search: cells found by gradients, evolution or chance, chains of blocks, and their full training."""
