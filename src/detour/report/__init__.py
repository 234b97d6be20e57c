"""What is told of a run after it: `report.html` (`page`), and the model card for the hub (`card`). No torch."""
