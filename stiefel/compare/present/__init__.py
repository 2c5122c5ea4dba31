"""From numbers to what people see: terminal, page, figures, tables. No torch."""
