//! The ACPI tables: how a kernel, ours or a distribution's, learns of processors and devices.
//!
//! Hardware-reduced ACPI (ACPI 6.5, 4.1): no PIT, no PIC, no PM timer, no SCI. The boot flags say
//! that there is no CMOS clock, no keyboard controller and no VGA, so that a stock kernel does not
//! spend thousands of exits on looking for them.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use crate::devices::power;
use crate::layout;
use crate::memory::GuestRam;

const OEM_ID: [u8; 6] = *b"RTVMM ";
const OEM_TABLE_ID: [u8; 8] = *b"RTVMM   ";
const OEM_REVISION: u32 = 1;

/// Length of the header that every table has.
const HEADER: u32 = 36;

/// FADT IAPC_BOOT_ARCH: there is no VGA.
const NO_VGA: u16 = 1 << 2;
/// FADT IAPC_BOOT_ARCH: message signalled interrupts must not be used; there is no PCI.
const NO_MSI: u16 = 1 << 3;
/// FADT IAPC_BOOT_ARCH: there is no PCIe active state power management to control.
const NO_ASPM: u16 = 1 << 4;
/// FADT IAPC_BOOT_ARCH: there is no CMOS clock. The bit for a keyboard controller stays off, too.
const NO_CMOS_RTC: u16 = 1 << 5;

/// Why the tables could not be given to the guest. Both are faults of the machine's layout.
#[derive(Debug, Error)]
pub enum AcpiError {
    /// The tables are longer than the area for them.
    #[error("the ACPI tables need {bytes} bytes, which is more than their area has")]
    TooLong {
        /// Their length.
        bytes: usize,
    },
    /// The area is not in guest memory.
    #[error("writing the ACPI tables to guest memory")]
    Write(#[source] vm_memory::GuestMemoryError),
}

/// A virtio-mmio device as the tables describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MmioDevice {
    /// Address of its registers.
    pub base: u32,
    /// Its interrupt line.
    pub gsi: u32,
}

/// What the tables describe.
#[derive(Debug)]
pub(crate) struct Machine<'a> {
    pub vcpus: u8,
    pub serial: bool,
    pub devices: &'a [MmioDevice],
}

/// Writes the tables for `machine` and returns the address of the root pointer (RSDP).
pub(crate) fn write_tables(ram: &GuestRam, machine: &Machine<'_>) -> Result<u64, AcpiError> {
    let mut area = Area::default();
    // The root pointer comes first, its target is known last.
    area.bytes.resize(Rsdp::len(), 0);
    let dsdt = area.place(&dsdt(machine));
    let fadt = area.place(&fadt(dsdt));
    let madt = area.place(&madt(machine.vcpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = area.place(&xsdt);
    let mut root = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut root);
    area.bytes.splice(..root.len(), root);

    let bytes = area.bytes.len();
    if bytes as u64 > layout::ACPI_TABLES_END - layout::ACPI_TABLES {
        return Err(AcpiError::TooLong { bytes });
    }
    ram.write_slice(&area.bytes, GuestAddress(layout::ACPI_TABLES))
        .map_err(AcpiError::Write)?;
    Ok(layout::ACPI_TABLES)
}

/// The area of the tables while it is filled.
#[derive(Default)]
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and returns its address in the guest.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = layout::ACPI_TABLES + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn port(offset: u16) -> GAS {
    let address = u64::from(layout::POWER_PORT + offset);
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        address,
    )
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_MSI | NO_ASPM | NO_CMOS_RTC).into();
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.finalize()
}

fn madt(vcpus: u8) -> impl Aml {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn dsdt(machine: &Machine<'_>) -> Sdt {
    let mut aml = Vec::new();
    let sleep = power::S5_SLEEP_TYPE;
    let package = Package::new(vec![&sleep, &0u8, &0u8, &0u8]);
    Name::new("_S5_".into(), &package).to_aml_bytes(&mut aml);
    let numbered = (0..).zip(machine.devices);
    let devices: Vec<_> = numbered.map(|(uid, d)| VirtioMmio(uid, *d)).collect();
    let mut children: Vec<&dyn Aml> = devices.iter().map(|d| d as &dyn Aml).collect();
    if machine.serial {
        children.push(&SerialPort);
    }
    Scope::new("\\_SB_".into(), children).to_aml_bytes(&mut aml);
    let mut table = Sdt::new(*b"DSDT", HEADER, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// A virtio-mmio device: `LNRO0005`, its registers and its interrupt.
struct VirtioMmio(u32, MmioDevice);

impl Aml for VirtioMmio {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Self(uid, device) = *self;
        let size = layout::VIRTIO_MMIO_SIZE as u32;
        Device::new(
            Path::new(&format!("V{uid:03}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &uid),
                // Coherent for DMA: without it Linux bounces or refuses.
                &Name::new("_CCA".into(), &1u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Memory32Fixed::new(true, device.base, size),
                        &Interrupt::new(true, true, false, false, device.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

/// The serial console, where the guest is to use it as a terminal.
struct SerialPort;

impl Aml for SerialPort {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let port = layout::SERIAL_PORT;
        Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &0u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(port, port, 1, 8),
                        &Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(sink);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Memory, MemorySize};

    fn tables(vcpus: u8, devices: &[MmioDevice]) -> (Vec<u8>, u64) {
        let memory = Memory::new(MemorySize::from_mib(16).unwrap()).unwrap();
        let machine = Machine {
            vcpus,
            serial: true,
            devices,
        };
        let rsdp = write_tables(memory.ram(), &machine).unwrap();
        let mut area = vec![0; (layout::ACPI_TABLES_END - layout::ACPI_TABLES) as usize];
        let start = GuestAddress(layout::ACPI_TABLES);
        memory.ram().read_slice(&mut area, start).unwrap();
        (area, rsdp - layout::ACPI_TABLES)
    }

    fn table(area: &[u8], address: u64) -> &[u8] {
        let start = (address - layout::ACPI_TABLES) as usize;
        let length = u32::from_le_bytes(area[start + 4..start + 8].try_into().unwrap());
        let table = &area[start..start + length as usize];
        let sum = table.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
        assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
        table
    }

    fn address(bytes: &[u8]) -> u64 {
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_from_the_root_pointer_with_a_right_checksum() {
        let device = MmioDevice {
            base: 0xd000_0000,
            gsi: 5,
        };
        let (area, rsdp) = tables(3, &[device]);
        let rsdp = &area[rsdp as usize..][..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!(rsdp.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        let xsdt = table(&area, address(&rsdp[24..32]));
        let fadt = table(&area, address(&xsdt[36..44]));
        let madt = table(&area, address(&xsdt[44..52]));
        let dsdt = table(&area, address(&fadt[140..148]));
        assert_eq!(&fadt[..4], b"FACP");
        // IAPC_BOOT_ARCH: no CMOS clock, no VGA, no keyboard controller.
        let flags = u16::from_le_bytes([fadt[109], fadt[110]]);
        assert_eq!(flags & 0b10_0110, 0b10_0100);
        // Three processors of 8 bytes and an I/O APIC of 12.
        assert_eq!(madt.len(), 44 + 3 * 8 + 12);
        assert_eq!(&dsdt[..4], b"DSDT");
        let find = |text: &[u8]| dsdt.windows(text.len()).any(|w| w == text);
        assert!(find(b"_S5_") && find(b"LNRO0005") && find(b"COM1"));
    }

    #[test]
    fn the_largest_machine_fits_the_area() {
        let devices = [MmioDevice { base: 0, gsi: 0 }; layout::VIRTIO_MMIO_MAX as usize];
        let (area, _) = tables(u8::MAX - 1, &devices);
        assert!(!area.is_empty());
    }
}
